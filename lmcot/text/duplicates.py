"""Finds texts that are nearly the same as an earlier one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Final

_WORD: Final = re.compile(r"\w+")
_RUN: Final = 3
"""Words in a sequence."""


class NearDuplicates:
    """Texts, of which none is nearly the same as another.

    Two texts are nearly the same if the Jaccard index of their sets of three-word sequences reaches
    a threshold. Sets with such an index share one of their first sequences in any common order, if
    "first" is as many as the threshold lets them differ by, and one (prefix filtering, Chaudhuri et
    al. 2006): only these are looked up.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._texts: list[frozenset[str]] = []
        self._by_sequence: dict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Adds a text; False, and nothing is added, if it is nearly the same as an earlier one."""
        found = _sequences(text)
        first = sorted(found)[: len(found) - math.ceil(self._threshold * len(found)) + 1]
        candidates = {place for one in first for place in self._by_sequence[one]}
        if any(self._alike(found, self._texts[place]) for place in candidates):
            return False
        for one in first:
            self._by_sequence[one].append(len(self._texts))
        self._texts.append(found)
        return True

    def _alike(self, one: frozenset[str], other: frozenset[str]) -> bool:
        return len(one & other) >= self._threshold * len(one | other)


def _sequences(text: str) -> frozenset[str]:
    words = _WORD.findall(text.lower())
    if len(words) < _RUN:
        return frozenset([" ".join(words)])
    return frozenset(" ".join(words[at : at + _RUN]) for at in range(len(words) - _RUN + 1))
