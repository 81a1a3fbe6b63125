"""Self-consistency: a vote over the answers that several rationales led to (Wang et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmcot.text.answers import normalize_answer


@dataclass(frozen=True, slots=True)
class Vote:
    """Who won."""

    answer: str
    """As the first of those wrote it that voted for it; empty if nobody gave an answer."""
    winner: int | None
    """Which of the answers that was."""
    share: float
    """Of all who had a vote, also those without an answer: 0 to 1."""
    counts: dict[str, int]
    """Votes by normalised answer, in the order of their first appearance."""


def vote(
    answers: Sequence[str],
    cut: Sequence[bool] | None = None,
    key: Callable[[str], str] = normalize_answer,
) -> Vote:
    """The most frequent answer after normalisation; of equals the one that came first.

    Empty answers are votes for nothing.

    Args:
        cut: for each answer, whether its reasoning was cut before it came to an end. Such an
            answer may be half of one: it counts only where there is no other. Unset: none was.
        key: the form in which answers are compared.
    """
    complete = [
        index for index, answer in enumerate(answers) if answer and not (cut and cut[index])
    ]
    counts: dict[str, int] = {}
    first: dict[str, int] = {}
    for index in complete or range(len(answers)):
        normal = key(answers[index])
        if normal:
            counts[normal] = counts.get(normal, 0) + 1
            first.setdefault(normal, index)
    if not counts:
        return Vote("", None, 0.0, {})
    best = max(counts, key=lambda normal: counts[normal])  # the first of equals
    return Vote(answers[first[best]], first[best], counts[best] / len(answers), counts)
