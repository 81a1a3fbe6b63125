"""How much of a rationale is copied from its context."""

from __future__ import annotations

from collections.abc import Iterable

from lmcot.text.answers import normalize_answer

RUN = 8
"""Words in a row that are no chance any more."""


def copied_share(rationale: str, passages: Iterable[str], run: int = RUN) -> float:
    """Share of a rationale's words that stand in ``run`` or more words copied in a row; 0 to 1.

    Words are compared as answers are: in lower case, without punctuation and articles. A rationale
    of fewer words copies nothing.
    """
    known: set[tuple[str, ...]] = set()
    for passage in passages:
        words = normalize_answer(passage).split()
        known.update(tuple(words[at : at + run]) for at in range(len(words) - run + 1))
    words = normalize_answer(rationale).split()
    copied = [False] * len(words)
    for at in range(len(words) - run + 1):
        if tuple(words[at : at + run]) in known:
            copied[at : at + run] = [True] * run
    return sum(copied) / len(words) if words else 0.0
