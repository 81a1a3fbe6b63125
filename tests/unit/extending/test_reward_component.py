"""The component of docs/extending.md is judged, weighed and checked as those of lmcot are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from lmcot.config import GuidanceRewards
from lmcot.config import rewards as settings
from lmcot.data import load_templates
from lmcot.records import (
    Choice,
    Completion,
    Example,
    Failure,
    Judgement,
    Paragraph,
    Prompt,
    Sampling,
    Score,
)
from lmcot.rewards import components
from lmcot.rewards.combine import scalar_reward
from lmcot.rewards.judge import RewardModel
from tests.support.worked import python_blocks

EXAMPLE = Example("1", "Which river?", "Brann", (Paragraph("Velm", ("It lies on the Brann.",)),))
SHORT, LONG = "It is the Brann.", " ".join(["word"] * 80)


class AnswersBrann:
    """A frozen LM that is asked for answers alone."""

    identity, parameters = "known", None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        return [Completion("Brann", 9, 1, "stop") for _ in prompts]

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        raise AssertionError("nothing is chosen")

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        raise AssertionError("nothing is scored")


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> type[GuidanceRewards]:
    """The settings and the table with what the page says to add."""
    field, component = python_blocks("A reward component")
    names: dict[str, Any] = dict(vars(settings))
    exec(f"class Extended(GuidanceRewards):\n{field}", names)
    table: dict[str, Any] = dict(vars(components))
    exec(component, table)
    monkeypatch.setattr(components, "COMPONENTS", (*components.COMPONENTS, table["BREVITY"]))
    found: type[GuidanceRewards] = names["Extended"]
    return found


def judged(rewards: GuidanceRewards) -> list[Judgement]:
    model = RewardModel(rewards, AnswersBrann(), load_templates("default"), 8)
    return model.judge([EXAMPLE] * 3, [SHORT, LONG, ""])


def weighed(settings: type[GuidanceRewards], weight: float | None) -> GuidanceRewards:
    values = {"em_weight": 0, "f1_weight": 1, "aspects": {}, "brevity_weight": weight}
    return settings.model_validate(values)


def test_it_is_measured_and_weighed(extended: type[GuidanceRewards]) -> None:
    rewards = weighed(extended, 2)
    found = judged(rewards)
    assert [one.components["brevity"] for one in found] == [1.0, 0.25, 0.0]
    assert [scalar_reward(one, rewards) for one in found] == [3.0, 1.5, 1.0]


def test_unset_it_is_not_measured(extended: type[GuidanceRewards]) -> None:
    rewards = weighed(extended, None)
    assert [set(one.components) for one in judged(rewards)] == [{"em", "f1", "inclusion"}] * 3


def test_its_weight_is_a_setting_like_others(extended: type[GuidanceRewards]) -> None:
    assert extended().model_dump()["brevity_weight"] is None
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        weighed(extended, -1)
    alone = extended.model_validate({"em_weight": 0, "f1_weight": 0, "brevity_weight": 1})
    assert components.component_weights(alone)["brevity"] == 1
