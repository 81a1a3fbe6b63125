"""Where the sentences of a passage end, in the scripts that mark it."""

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
CLOSERS = "\u201d\u2019)\\]\u300d\u300f\uff09\u3011\u300b\u3009\u00bb"
"""Closing quotes and brackets, as the inside of a pattern's class."""

_OPENERS = "\"'\u201c\u2018([\u00ab"
_END = re.compile(
    rf"(?<=[.!?])(?P<space>[\"'{CLOSERS}]*\s+)|(?<![{STOPS}])[{STOPS}]++[{CLOSERS}]*\s*"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Jr|Sr|No|Vol|vs|etc|approx|Inc|Ltd|Co|Gen|Col|Lt|Sgt|Rev)"
    r"|\b[^\W\d_])\.\Z"
)
_LONGEST_ABBREVIATION = 10


def split_sentences(text: str) -> list[str]:
    """The sentences of a passage, by a modest rule.

    A sentence ends at ``.``, ``!`` or ``?`` (with closing quotes or brackets) before white space
    and what may begin one: a digit or a letter that is not small. A common abbreviation or a single
    letter (an initial, ``U.S.``) before the full stop ends none. The full stops, question and
    exclamation marks of other scripts end one wherever they stand. Thai marks no ends: a passage
    in it is one sentence. No text is lost but the white space between sentences.
    """
    sentences, start = [], 0
    for end in _END.finditer(text):
        if end["space"] is not None and not _parts(text, start, end):
            continue
        sentences.append(text[start : end.end()].strip())
        start = end.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _parts(text: str, start: int, end: re.Match[str]) -> bool:
    """Whether white space after a full stop, or a quote behind it, stands between sentences."""
    following = text[end.end() : end.end() + 2].lstrip(_OPENERS)[:1]
    if not following.isdigit() and (not following.isalpha() or following.islower()):
        return False
    if not end[0].isspace():  # a quote or bracket closes after the full stop
        return True
    begin = max(start, end.start() - _LONGEST_ABBREVIATION)
    return _ABBREVIATION.search(text[begin : end.start()]) is None
