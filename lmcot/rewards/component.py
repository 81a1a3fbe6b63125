"""A component of the reward: one number of a rationale, its weight and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcot.config import GuidanceRewards
from lmcot.config.prompts import GuidedKind
from lmcot.data.prompts import PromptTemplates
from lmcot.data.tasks import EXTRACTIVE_QA, Scores, Task
from lmcot.frozen.needs import Measure
from lmcot.frozen.protocol import FrozenLM
from lmcot.records import Answer, Example, Failure

if TYPE_CHECKING:
    from lmcot.rewards.aspects import AspectMeter

Measured = float | Failure
"""A value, or the reason why there is none."""


@dataclass
class Context:
    """What a component may use to measure some rationales."""

    frozen: FrozenLM
    """The frozen LM, for the calls that the component names in its ``needs``."""
    templates: PromptTemplates
    """Templates of the frozen LM's prompts, with their demonstrations."""
    answers: Sequence[Answer | Failure]
    """The frozen LM's answer given each rationale, or its failure."""
    meter: AspectMeter
    """The meter of the aspects."""
    kind: GuidedKind = "guided"
    """How the frozen LM is shown a rationale: with the passages, or without them."""
    task: Task = EXTRACTIVE_QA
    """How answers are compared."""
    _aspects: list[dict[str, Measured]] = field(default_factory=list)
    _scores: list[Scores | Failure] = field(default_factory=list)

    def scores(self, examples: Sequence[Example]) -> list[Scores | Failure]:
        """What each answer is worth, by the task; each is compared once."""
        if not self._scores:
            self._scores = [
                said if isinstance(said, Failure) else self.task.scores(said.extracted, example)
                for example, said in zip(examples, self.answers, strict=True)
            ]
        return self._scores

    def aspect(
        self, component: str, examples: Sequence[Example], rationales: Sequence[str]
    ) -> list[Measured]:
        """The values of one aspect. All aspects are measured at once: they share requests."""
        if not self._aspects:
            self._aspects = self.meter.measure(
                examples, rationales, frozen=self.frozen, templates=self.templates
            )
        return [values[component] for values in self._aspects]


Measurement = Callable[[Sequence[Example], Sequence[str], Context], list[Measured]]
"""Gives a value or a failure for each rationale, from the example that it belongs to."""


@dataclass(frozen=True, slots=True)
class Component:
    """One number of a rationale, which the reward may weigh."""

    name: str
    """Its name in judgements and metrics."""
    setting: str
    """The field of `GuidanceRewards` with its weight; where that is None, it is not measured."""
    values: str
    """The range of its values, in words."""
    meaning: str
    """What it says about a rationale, in words."""
    measure: Measurement
    """The function that measures it."""
    needs: frozenset[Measure] = frozenset()
    """Calls to the frozen LM that it makes beside the answers."""

    def weight(self, rewards: GuidanceRewards) -> float | None:
        """Its weight in the reward; 0: it is measured and logged only; None: not measured."""
        weight: float | None = getattr(rewards, self.setting)
        return weight

    def calls(self, rewards: GuidanceRewards) -> frozenset[Measure]:
        """Calls to the frozen LM that it makes with these settings."""
        del rewards
        return self.needs

    def remedy(self, rewards: GuidanceRewards) -> str:
        """The advice about its setting where the frozen LM does not offer those calls."""
        del rewards
        return "leave it out"

    def without(self, rewards: GuidanceRewards) -> GuidanceRewards:
        """The settings without this component."""
        return rewards.model_copy(update={self.setting: None})
