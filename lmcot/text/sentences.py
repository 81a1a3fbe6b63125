"""Where sentences end: one rule for passages of Wikipedia and for what language models write."""

from __future__ import annotations

import re

STOPS = (
    "\u3002\uff61\uff01\uff1f"  # Chinese, Japanese
    "\u0964\u0965"  # Hindi and other languages of India
    "\u061f\u06d4\u0589"  # Arabic, Urdu, Armenian
    "\u1362\u1367\u104b\u17d4\u17d5\u0f0d\u0f0e\u1803"  # Ethiopic, Burmese, Khmer, Tibetan
    "\u203c\u2047\u2048\u2049"
)
"""Characters that end a sentence wherever they stand, with or without white space after them."""
_CLOSERS = "\u201d\u2019)\\]\u300d\u300f\uff09\u3011\u300b\u3009\u00bb"
"""Closing quotes and brackets, as the inside of a pattern's class."""
_END = re.compile(
    rf"(?:[.!?][\"'{_CLOSERS}]*+\s++|(?<![{STOPS}])[{STOPS}]++[{_CLOSERS}]*+\s*+)(?=\S)"
)
_ABBREVIATION_LIST = """
mr mrs ms dr st jr sr vs v inc ltd co corp vol mt ft gen lt col capt sgt maj cmdr prof rev hon
gov sen rep pres fr bros dept univ est al ca c b d e.g i.e feat ed pp op approx fig figs
jan feb mar apr jun jul aug sept sep oct nov dec
"""
_ABBREVIATIONS = frozenset(_ABBREVIATION_LIST.split())
_LONGEST_ABBREVIATION = 40


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, stripped; line breaks end a sentence too.

    A sentence ends at ``.``, ``!`` or ``?``, with closing quotes and brackets, before white space.
    A full stop after an initial ("J. R. R."), a dotted abbreviation ("U.S. ") or a known one
    ("St. ") ends none. The stops of other scripts end one without white space, too. Thai marks no
    ends: a text in it is one sentence. Nothing is lost but white space.
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
