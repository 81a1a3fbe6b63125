"""The gain in the gold answer's likelihood, with a frozen LM whose scores are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lmcot.config import GuidanceRewards
from lmcot.data import load_templates
from lmcot.records import (
    Choice,
    Completion,
    Example,
    Failure,
    FailureKind,
    Paragraph,
    Prompt,
    Sampling,
    Score,
)
from lmcot.rewards.aspects import AspectMeter
from lmcot.rewards.component import Context, Measured
from lmcot.rewards.likelihood import likelihood_gains

HANGS = Failure(FailureKind.TRANSIENT, "the endpoint hangs")


def example(number: int, answer: str = "Humboldt River") -> Example:
    context = (Paragraph("Elko", ("The city straddles the Humboldt River.",)),)
    return Example(str(number), f"Question {number}?", answer, context)


class ScoringLM:
    """Scores by the last line of the prompt that it knows."""

    identity = "scoring"
    parameters = None

    def __init__(self, scores: dict[str, Score | Failure]) -> None:
        self.scores = scores
        self.calls: list[tuple[list[Prompt], list[str]]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        raise AssertionError("nothing is generated")

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        raise AssertionError("nothing is chosen")

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        self.calls.append((list(prompts), list(continuations)))
        return [self._score(prompt[-1].content) for prompt in prompts]

    def _score(self, text: str) -> Score | Failure:
        lines = [line.removeprefix("A student's ") for line in text.splitlines()]
        lines = [line for line in lines if line in self.scores]
        return self.scores[lines[-1]]


def gains(
    scores: dict[str, Score | Failure], examples: list[Example], rationales: list[str]
) -> tuple[list[Measured], ScoringLM]:
    frozen = ScoringLM(scores)
    return likelihood_gains(examples, rationales, context(frozen)), frozen


def context(frozen: ScoringLM, templates: str = "default") -> Context:
    meter = AspectMeter(GuidanceRewards(aspects={}))
    return Context(frozen, load_templates(templates).showing(1), answers=[], meter=meter)


def score(logprob: float, tokens: int) -> Score:
    return Score(logprob, tokens, 40)


def test_the_gain_is_a_difference_of_mean_token_probabilities() -> None:
    # Four tokens of probability 0.1 each without, of 0.5 and 0.05 each with a rationale.
    found, _ = gains(
        {
            "Question: Question 1?": score(4 * math.log(0.1), 4),
            "reasoning: good": score(4 * math.log(0.5), 4),
            "reasoning: bad": score(4 * math.log(0.05), 4),
        },
        [example(1)] * 2,
        ["good", "bad"],
    )
    assert found == pytest.approx([0.4, -0.05])


def test_the_bounds_are_one() -> None:
    scores: dict[str, Score | Failure] = {
        "Question: Question 1?": score(-math.inf, 3),
        "Question: Question 2?": score(0.0, 3),
        "reasoning: sure": score(0.0, 3),
        "reasoning: never": score(-math.inf, 3),
    }
    found, _ = gains(scores, [example(1), example(2)], ["sure", "never"])
    assert found == [1.0, -1.0]


def test_all_are_asked_in_one_call_and_an_example_without_a_rationale_once() -> None:
    scores: dict[str, Score | Failure] = {
        "Question: Question 1?": score(-1, 1),
        "Question: Question 2?": score(-2, 1),
        "reasoning: some": score(-3, 1),
    }
    examples = [example(1), example(1), example(2, "yes"), example(1)]
    found, frozen = gains(scores, examples, ["some"] * 4)
    [(prompts, answers)] = frozen.calls
    assert len(prompts) == 2 + 4
    assert answers == ["Humboldt River", "yes", *(one.answer for one in examples)]
    templates = load_templates("default").showing(1)
    assert prompts[:2] == [templates.standard(one) for one in (example(1), example(2))]
    assert prompts[2] == templates.guided(example(1), "some")
    first, second = math.exp(-3) - math.exp(-1), math.exp(-3) - math.exp(-2)
    assert found == pytest.approx([first, first, second, first])


def test_a_base_models_reply_holds_the_answer_in_its_own_form() -> None:
    frozen = ScoringLM({"Question: Question 1?": score(-1, 5), "Reasoning: some": score(-1, 5)})
    likelihood_gains([example(1)], ["some"], context(frozen, "base"))
    [(_, continuations)] = frozen.calls
    assert continuations == ["Humboldt River", "the answer is Humboldt River."]


def test_without_passages_the_gain_is_over_the_question_alone() -> None:
    frozen = ScoringLM(
        {"reasoning: some": score(math.log(0.5), 1), "reasoning: ": score(math.log(0.2), 1)}
    )
    alone = replace(context(frozen), kind="rationale_only")
    assert likelihood_gains([example(1)], ["some"], alone) == pytest.approx([0.3])
    [(prompts, _)] = frozen.calls
    assert not any("straddles" in one.content for prompt in prompts for one in prompt)


@pytest.mark.parametrize("broken", ["Question: Question 1?", "reasoning: some"])
def test_either_failure_is_the_measure_of_all_that_need_it(broken: str) -> None:
    """[16] Never a gain of zero."""
    scores: dict[str, Score | Failure] = {
        "Question: Question 1?": score(-1, 1),
        "Question: Question 2?": score(-1, 1),
        "reasoning: some": score(-1, 1),
        "reasoning: other": score(-1, 1),
    }
    found, _ = gains(
        {**scores, broken: HANGS},
        [example(1), example(2)],
        ["some", "other"],
    )
    assert found == [HANGS, 0.0]
