"""Metrics of real rationales against degenerate ones, and what the meter asks of whom."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean

import pytest

from lmcot.config import ASPECTS, AspectSettings, GuidanceRewards, SampleData
from lmcot.data import load_examples
from lmcot.records import Example
from lmcot.rewards import metrics
from lmcot.rewards.aspects import TEXT_MEASURES, AspectMeter
from lmcot.text.content import content_words
from lmcot.text.sentences import split_sentences

Metric = Callable[[Example, str], float]
COUNT = 8


@cache
def _real() -> tuple[list[Example], list[str]]:
    """Questions of the shipped sample, with their supporting facts and answer as rationales."""
    loaded = load_examples(SampleData(kind="sample", split="train")).examples
    examples = [example for _, example in zip(range(COUNT), loaded, strict=False)]
    rationales = [
        " ".join([*example.gold_sentences(), f"So the answer is {example.answer}."])
        for example in examples
    ]
    return examples, rationales


def _degenerate(kind: str) -> list[str]:
    examples, rationales = _real()
    pairs = list(zip(examples, rationales, strict=True))
    made: dict[str, Callable[[], Sequence[str]]] = {
        "empty": lambda: [""] * COUNT,
        "word": lambda: [" ".join([sorted(content_words(r))[0]] * 20) for r in rationales],
        "words": lambda: [f"{sorted(content_words(r))[-1]}. " * 20 for r in rationales],
        "question": lambda: [example.question for example in examples],
        "context": lambda: [
            " ".join(s for paragraph in example.context for s in paragraph.sentences)
            for example, _ in pairs
        ],
        "other": lambda: [*rationales[1:], rationales[0]],
        "shuffled": lambda: [_shuffled(r, seed) for seed, r in enumerate(rationales)],
        "reversed": lambda: [" ".join(split_sentences(r)[::-1]) for r in rationales],
    }
    return list(made[kind]())


def _shuffled(rationale: str, seed: int) -> str:
    sentences = split_sentences(rationale)
    changed = list(sentences)
    generator = random.Random(seed)
    while changed == sentences:
        generator.shuffle(changed)
    return " ".join(changed)


# Which metric catches what: "each" rationale by itself, or only "mean", over the examples.
# Not in the table, since no metric sees it: a shuffled rationale whose conclusion still comes
# last, another question's rationale by naturalness or readability (it is as good English), and
# the question or the whole context by readability.
CAUGHT = {
    ("factuality", "empty"): "each",
    ("factuality", "word"): "each",
    ("factuality", "question"): "each",
    ("factuality", "other"): "each",
    ("relevance", "empty"): "each",
    ("relevance", "word"): "each",
    ("relevance", "words"): "each",
    ("relevance", "context"): "each",
    ("relevance", "other"): "each",
    ("coherence", "empty"): "each",
    ("coherence", "word"): "each",
    ("coherence", "words"): "each",
    ("coherence", "question"): "each",
    ("coherence", "other"): "mean",
    ("coherence", "shuffled"): "mean",
    ("coherence", "reversed"): "mean",
    ("naturalness", "empty"): "each",
    ("naturalness", "word"): "each",
    ("naturalness", "words"): "each",
    ("naturalness", "context"): "mean",
    ("readability", "empty"): "each",
}


@pytest.mark.parametrize(("aspect", "kind"), CAUGHT)
def test_degenerate_rationales_score_lower(aspect: str, kind: str) -> None:
    metric: Metric = getattr(metrics, aspect)
    examples, rationales = _real()
    real = [metric(e, r) for e, r in zip(examples, rationales, strict=True)]
    bad = [metric(e, r) for e, r in zip(examples, _degenerate(kind), strict=True)]
    assert fmean(bad) < fmean(real)
    if CAUGHT[aspect, kind] == "each":
        assert all(b < r for b, r in zip(bad, real, strict=True)), (bad, real)


def test_metrics_are_fast() -> None:
    """Well under 5 ms a rationale for all of them; the limit leaves room for a busy machine."""
    meter = AspectMeter(GuidanceRewards())
    examples, rationales = _real()
    content_words.cache_clear()
    start = time.process_time()
    meter.columns(TEXT_MEASURES, examples, rationales)
    assert (time.process_time() - start) / COUNT < 0.02


def test_an_aspect_that_is_off_has_no_component() -> None:
    aspects = dict.fromkeys(ASPECTS, "off") | {"relevance": "metrics"}
    rewards = GuidanceRewards.model_validate(
        {"aspects": {name: {"source": source} for name, source in aspects.items()}}
    )
    examples, rationales = _real()
    rows = AspectMeter(rewards).measure(examples, rationales)
    assert [list(row) for row in rows] == [["aspect/relevance"]] * COUNT
    assert AspectSettings(source="off").weight == 0
