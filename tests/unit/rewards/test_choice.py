"""The probability of the right option as a component."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pydantic import TypeAdapter

from lmcot.config import GuidanceRewards, parse_config
from lmcot.config.task import TaskChoice
from lmcot.data.prompts import load_templates
from lmcot.data.tasks import open_task
from lmcot.errors import UserError
from lmcot.records import (
    Choice,
    Completion,
    Example,
    Failure,
    FailureKind,
    Prompt,
    Sampling,
    Score,
)
from lmcot.rewards.aspects import AspectMeter
from lmcot.rewards.choice import choice_probabilities
from lmcot.rewards.component import Context, Measured

HANGS = Failure(FailureKind.TRANSIENT, "the endpoint hangs")
TWO = "Which floats?\n(A) granite\n(B) pumice"
THREE = "Which sinks?\n(A) granite\n(B) pumice\n(C) cork"


class ChoosingLM:
    """The later an option, the likelier."""

    identity = "choosing"
    parameters = None

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        raise AssertionError("nothing is generated")

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score | Failure]:
        raise AssertionError("nothing is scored")

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        self.asked.append((len(prompts), tuple(options)))
        total = sum(range(1, len(options) + 1))
        shares = {one: at / total for at, one in enumerate(options, 1)}
        fails = ["hangs" in prompt[-1].content for prompt in prompts]
        return [HANGS if one else Choice(shares, 1, 0) for one in fails]


def measured(
    kind: str, examples: list[Example], rationales: list[str]
) -> tuple[list[Measured], ChoosingLM]:
    frozen, meter = ChoosingLM(), AspectMeter(GuidanceRewards())
    task = open_task(TypeAdapter(TaskChoice).validate_python(kind))
    templates = load_templates("multiple_choice").showing(0)
    context = Context(frozen, templates, [], meter, task=task)
    return choice_probabilities(examples, rationales, context), frozen


def test_questions_with_the_same_options_are_asked_together() -> None:
    examples = [
        Example("1", TWO, "B", (), aliases=("pumice",)),
        Example("2", THREE, "A", (), aliases=("granite",)),
        Example("3", TWO, "A", (), aliases=("granite",)),
        Example("4", TWO, "A", (), aliases=("granite",)),
    ]
    found, frozen = measured("multiple_choice", examples, ["air", "holes", "heavy", "it hangs"])
    assert found == [pytest.approx(2 / 3), pytest.approx(1 / 6), pytest.approx(1 / 3), HANGS]
    assert frozen.asked == [(3, ("A", "B")), (1, ("A", "B", "C"))]


def test_yes_and_no_are_options() -> None:
    found, _ = measured("boolean", [Example("1", "Is it?", "yes", ())], ["so"])
    assert found == [pytest.approx(1 / 3)]


def test_a_question_without_options_is_not_measured() -> None:
    found, frozen = measured("multiple_choice", [Example("1", "Which?", "B", ())], ["so"])
    assert isinstance(found[0], Failure)
    assert "no options" in found[0].reason
    assert frozen.asked == []


def test_the_weight_is_refused_where_there_are_no_options() -> None:
    settings = {
        "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
        "policy": {"source": "random:t5"},
        "frozen": {"backend": "transformers", "source": "random:t5"},
        "refine": {"start_from": "base"},
        "rewards": {"choice_probability_weight": 0.5},
    }
    with pytest.raises(UserError, match="has no options"):
        parse_config(settings)
    assert parse_config({**settings, "task": "boolean"}).prompts.templates == "boolean"
