"""Chooses the rationale of each question that the small LM learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from lmcot.records import Annotation, Example
from lmcot.rewards.metrics import factuality
from lmcot.text.duplicates import NearDuplicates
from lmcot.training.reasons import ANOTHER_IS_BETTER, NEAR_DUPLICATE, is_good

BestBy = Literal["factuality", "shortest", "first"]


def choose(
    examples: Iterable[Example],
    annotations: Mapping[str, Sequence[Annotation]],
    best_by: BestBy,
    near_duplicates: float | None,
    good: str,
) -> list[Annotation]:
    """Keeps one good rationale of each question, and rejects the others with a reason.

    The best one is kept that is not nearly the same as one that was kept before, in the order of
    the questions.

    Args:
        annotations: by question; those of a question stay in their order.
        good: the reason of what is kept, where it was rejected in an earlier choice.
    """
    kept = NearDuplicates(near_duplicates) if near_duplicates is not None else None
    chosen: list[Annotation] = []
    for example in examples:
        known = annotations.get(example.id, ())
        reasons: dict[int, str] = {}
        for place in _best_first(example, known, best_by):
            if "" in reasons.values():
                reasons[place] = ANOTHER_IS_BETTER
            elif kept is None or kept.add(known[place].rationale):
                reasons[place] = ""
            else:
                reasons[place] = NEAR_DUPLICATE
        chosen += [_decided(one, reasons.get(place), good) for place, one in enumerate(known)]
    return chosen


def _best_first(example: Example, known: Sequence[Annotation], best_by: BestBy) -> list[int]:
    """Places of the good ones; those without a hint come first."""

    def key(place: int) -> tuple[bool, float, int]:
        one = known[place]
        support = -factuality(example, one.rationale) if best_by == "factuality" else 0.0
        return (one.hinted, support, 0 if best_by == "first" else len(one.rationale))

    return sorted((place for place, one in enumerate(known) if is_good(one)), key=key)


def _decided(one: Annotation, reason: str | None, good: str) -> Annotation:
    if reason is None:
        return one
    if reason:
        return replace(one, kept=False, reason=reason)
    return one if one.kept else replace(one, kept=True, reason=good)
