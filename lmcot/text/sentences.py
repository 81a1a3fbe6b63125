"""Where sentences end: enough for Wikipedia prose and for what language models write."""

from __future__ import annotations

import re

from lmcot.text.passage_sentences import CLOSERS, STOPS

_END = re.compile(
    rf"(?:[.!?][\"'{CLOSERS}]*+\s++|(?<![{STOPS}])[{STOPS}]++[{CLOSERS}]*+\s*+)(?=\S)"
)
_ABBREVIATION_LIST = """
mr mrs ms dr st jr sr vs v inc ltd co corp vol mt ft gen lt col capt sgt maj cmdr prof rev hon
gov sen rep pres fr bros dept univ est al ca c b d e.g i.e feat ed pp op
jan feb mar apr jun jul aug sept sep oct nov dec
"""
_ABBREVIATIONS = frozenset(_ABBREVIATION_LIST.split())
_LONGEST_ABBREVIATION = 40


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, stripped; line breaks end a sentence too.

    A full stop after an initial ("J. R. R."), a dotted abbreviation ("U.S. ") or a known one
    ("St. ") ends none. The stops of other scripts end one without white space, too.
    """
    return [
        sentence
        for line in text.splitlines()
        for sentence in (piece.strip() for piece in _split_line(line))
        if sentence
    ]


def _split_line(line: str) -> list[str]:
    pieces, start = [], 0
    for end in _END.finditer(line):
        if line[end.start()] == "." and _abbreviates(line, start, end):
            continue
        pieces.append(line[start : end.end()])
        start = end.end()
    return [*pieces, line[start:]]


def _abbreviates(line: str, start: int, end: re.Match[str]) -> bool:
    """Whether a full stop belongs to the word before it; the sentence begins at ``start``."""
    # No more than a word is looked at: a text may be one long chain of abbreviations.
    before = line[max(start, end.start() - _LONGEST_ABBREVIATION) : end.start()].split()
    word = before[-1].lstrip("\"'\u201c\u2018([*") if before else ""
    initial = len(word) == 1 and word.isalpha() and word.isupper() and word != "I"
    dotted = re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", word) is not None
    number = word.lower() in ("no", "nos") and line[end.end()].isdigit()
    return initial or dotted or number or word.lower() in _ABBREVIATIONS
