"""Markup and entities in what a model wrote, which are no part of an answer."""

from __future__ import annotations

import re

from lmcot.text.sentences import STOPS

_BREAK = re.compile(r"<(?:br|/p|/li|/div|/h[1-6])\s{0,4}/?>|<0x0A>", re.IGNORECASE)
# Characters without width, which comparisons would not pass over.
_INVISIBLE = str.maketrans("\u2581\u00a0", "  ", "\u200b\u2060\ufeff\u00ad")
_MARKUP = re.compile(
    r"\*\*|__|`|\\(?:boxed|text(?:bf|it|rm)?|mathrm)\{|\\(?=[\"'])|\\[()\[\]]|\$\$"
    r"|<\|(?:begin|end)_of_box\|>|\[/?answer\]"
    r"|</?(?:(?:final[_ ]|short[_ ])?answer|ans|final|response|output|result|conclusion|solution"
    r"|b|i|u|em|strong|p|span|div|mark|code|pre|su[bp]|small|big|font|center|h[1-6]|ul|ol|li)"
    r"(?:\s[^<>]{0,100})?>",
    re.IGNORECASE,
)
_WRAPPING = (
    " \t\"'\u201c\u201d\u201e\u201a\u2018\u2019\u00ab\u00bb\u2039\u203a"
    "\u300c\u300d\u300e\u300f\u300a\u300b`*_<>{},;:\uff1a\uff0c"
)
_ENTITIES = {"amp": "&", "quot": '"', "apos": "'", "#39": "'", "nbsp": " ", "lt": "<", "gt": ">"}
_ENTITY = re.compile(rf"&({'|'.join(_ENTITIES)});")


def plain_characters(text: str) -> str:
    """The text with line breaks, spaces and characters in place of their tags and entities."""
    shown = _BREAK.sub("\n", text.translate(_INVISIBLE))
    return _ENTITY.sub(lambda entity: _ENTITIES[entity[1]], shown)


def without_markup(text: str) -> str:
    """The text without the marks of Markdown, LaTeX and HTML; what they enclose stays."""
    return _MARKUP.sub("", text)


def unwrapped(text: str) -> str:
    """The text without quotation marks, brackets, stops and spaces around it."""
    bare = text.strip(_WRAPPING).rstrip(".!?" + STOPS + _WRAPPING).strip()
    if len(bare) > 1 and bare[0] + bare[-1] in ("[]", "$$"):
        bare = bare[1:-1].strip(_WRAPPING)
    if not bare and len(text.strip()) == 1:
        return text.strip()  # a question may ask for a sign
    # A quotation mark whose partner stands within is none of the wrapping.
    halves = (f'"{bare}', f'{bare}"') if bare.count('"') % 2 else ()
    return next((half for half in halves if half in text), bare)
