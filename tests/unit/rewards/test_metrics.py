"""Measures of rationales: by hand, and on real rationales against degenerate ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcot.config import SampleData
from lmcot.data import load_examples
from lmcot.records import Example, Paragraph
from lmcot.rewards import metrics
from lmcot.text.sentences import split_sentences

Metric = Callable[[Example, str], float]
ALL: list[Metric] = [
    metrics.factuality,
    metrics.relevance,
    metrics.coherence,
    metrics.naturalness,
    metrics.readability,
]
EXAMPLE = Example(
    id="1",
    question="Which river does Elko straddle?",
    answer="Humboldt River",
    context=(
        Paragraph("Elko, Nevada", ("The city straddles the Humboldt River.",)),
        Paragraph("Kennels", ("They bred poodles.",)),
    ),
)


@pytest.mark.parametrize(
    ("metric", "rationale", "value"),
    [
        (metrics.factuality, "Elko straddles the Humboldt River.", 1),
        (metrics.factuality, "Elko straddles the Colorado. Elko!", (2 / 3 + 1) / 2),
        (metrics.factuality, "So the answer is Humboldt River.", 1),
        (metrics.factuality, "Elko Elko Elko", 1 / 3),
        (metrics.factuality, "Elko bred poodles.", 2 / 3),  # of the second passage, not of both
        (metrics.factuality, "It is so.", 0),
        (metrics.relevance, "The river of Elko.", 2 * 2 / (3 + 2)),  # of river, elko, straddle
        (metrics.relevance, "Elko Elko", 2 * 1 / (3 + 2)),
        (metrics.relevance, "Which river does Elko straddle?", 1),
        (metrics.relevance, "A city in Nevada.", 0),
        (metrics.coherence, "Elko straddles a river.", 2 / 3),  # with the question
        (metrics.coherence, "Which river does Elko straddle?", 0),
        (metrics.coherence, "Elko Elko Elko Elko", 1 / 3),
        (metrics.coherence, "Elko has mines. The mines closed.", (1 / 2 + 1 / 2) / 2),
        (metrics.coherence, "Elko has mines. Elko has mines.", (1 / 2 + 0) / 2),
        (metrics.coherence, "Elko has mines. Rome burnt.", (1 / 2 + 0) / 2),
        (metrics.naturalness, "one two three four five", 1),
        (metrics.naturalness, "go go go go", 1 / 3 * 1 / 2 * 1),
        (metrics.readability, "The cat sat. The dog ran.", 1),  # 206.835 - 3.045 - 84.6, clipped
        (metrics.readability, "Institutional internationalization", 0),
    ],
)
def test_values_by_hand(metric: Metric, rationale: str, value: float) -> None:
    assert metric(EXAMPLE, rationale) == pytest.approx(value)


def test_readability_by_the_formula() -> None:
    rationale = "The ci-ty of El-ko lies on a ri-ver.".replace("-", "")  # 11 syllables, 8 words
    ease = 206.835 - 1.015 * 8 - 84.6 * 11 / 8
    assert metrics.readability(EXAMPLE, rationale) == pytest.approx(ease / 100)


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("rationale", ["", "  \n", "...", "?!"])
def test_nothing_said_scores_nothing(metric: Metric, rationale: str) -> None:
    assert metric(EXAMPLE, rationale) == 0


@given(st.text(max_size=80), st.sampled_from(ALL))
def test_values_stay_in_the_unit_interval(rationale: str, metric: Metric) -> None:
    assert 0 <= metric(EXAMPLE, rationale) <= 1


@cache
def _sample() -> tuple[list[Example], list[str]]:
    """Questions of the shipped sample and rationales as the teacher ``supporting_facts`` writes."""
    settings = SampleData(kind="sample", split="train")
    examples = list(load_examples(settings).examples)
    rationales = [
        " ".join([*example.gold_sentences(), f"So the answer is {example.answer}."])
        for example in examples
    ]
    return examples, rationales


def _of_another_question(rationales: Sequence[str]) -> list[str]:
    return [*rationales[1:], rationales[0]]


def _first_sentence_repeated(rationales: Sequence[str]) -> list[str]:
    return [" ".join(split_sentences(rationale)[:1] * 4) for rationale in rationales]


def _half_of_another_question(rationales: Sequence[str]) -> list[str]:
    return [
        " ".join(split_sentences(own)[:1] + split_sentences(other)[1:])
        for own, other in zip(rationales, _of_another_question(rationales), strict=True)
    ]


@pytest.mark.parametrize(
    ("metric", "degenerate"),
    [
        (metrics.factuality, _of_another_question),
        (metrics.factuality, _half_of_another_question),
        (metrics.relevance, _of_another_question),
        (metrics.relevance, _half_of_another_question),
        (metrics.coherence, _first_sentence_repeated),
        (metrics.coherence, _half_of_another_question),
        (metrics.naturalness, _first_sentence_repeated),
    ],
)
def test_real_rationales_are_told_from_degenerate_ones(
    metric: Metric, degenerate: Callable[[Sequence[str]], list[str]]
) -> None:
    """By AUC. (Factuality has it easy: these rationales are quotations from the context.)"""
    examples, rationales = _sample()
    real = [metric(e, r) for e, r in zip(examples, rationales, strict=True)]
    false = [metric(e, r) for e, r in zip(examples, degenerate(rationales), strict=True)]
    auc = sum((r > f) + 0.5 * (r == f) for r in real for f in false) / len(real) / len(false)
    print(f"AUC {metric.__name__} {degenerate.__name__}: {auc:.3f}")
    assert auc > 0.8
