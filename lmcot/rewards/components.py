"""The table of the reward's components, which judging, weighing, checks, metrics and docs use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lmcot.config import ASPECTS, GuidanceRewards
from lmcot.records import Example, Failure
from lmcot.rewards.aspects import AspectComponent
from lmcot.rewards.choice import choice_probabilities
from lmcot.rewards.component import Component, Context, Measured, Measurement
from lmcot.rewards.likelihood import likelihood_gains


def _of_the_answer(metric: Literal["em", "f1", "inclusion"]) -> Measurement:
    """Compares the frozen LM's answer with the right one that it fits best, as the task does."""

    def measure(
        examples: Sequence[Example], rationales: Sequence[str], context: Context
    ) -> list[Measured]:
        del rationales
        return [
            one if isinstance(one, Failure) else getattr(one, metric)
            for one in context.scores(examples)
        ]

    return measure


COMPONENTS: tuple[Component, ...] = (
    Component(
        name="em",
        setting="em_weight",
        values="0 or 1",
        meaning="the frozen LM's answer, given the rationale, is a right answer",
        measure=_of_the_answer("em"),
    ),
    Component(
        name="f1",
        setting="f1_weight",
        values="0 to 1",
        meaning="the F1 of the words of that answer and of a right answer",
        measure=_of_the_answer("f1"),
    ),
    Component(
        name="inclusion",
        setting="inclusion_weight",
        values="0 or 1",
        meaning="that answer contains a right answer",
        measure=_of_the_answer("inclusion"),
    ),
    Component(
        name="likelihood_gain",
        setting="likelihood_gain_weight",
        values="-1 to 1",
        meaning="how much likelier the rationale makes the gold answer",
        measure=likelihood_gains,
        needs=frozenset({"score"}),
    ),
    Component(
        name="choice_probability",
        setting="choice_probability_weight",
        values="0 to 1",
        meaning="the frozen LM's probability of the right option among those of the question",
        measure=choice_probabilities,
        needs=frozenset({"choose"}),
    ),
)


def components() -> list[Component]:
    """All components in the order in which they are measured and added up.

    The components of the table without further calls come first, then the aspects, then the others.
    """
    free = [one for one in COMPONENTS if not one.needs]
    return [*free, *map(AspectComponent.of, ASPECTS), *(one for one in COMPONENTS if one.needs)]


def measured_components(rewards: GuidanceRewards) -> list[Component]:
    """The components that the settings ask for."""
    return [one for one in components() if one.weight(rewards) is not None]


def component_weights(rewards: GuidanceRewards) -> dict[str, float]:
    """The weight of each component that the settings ask for, custom rewards included."""
    table = {one.name: one.weight(rewards) for one in components()}
    custom = {name: one.weight for name, one in rewards.custom_rewards.items()}
    return {name: weight for name, weight in table.items() if weight is not None} | custom
