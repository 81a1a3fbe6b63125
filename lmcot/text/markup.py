"""Markup and entities in what a model wrote, which are no part of an answer."""

from __future__ import annotations

import re

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
_ENTITIES = {"amp": "&", "quot": '"', "apos": "'", "#39": "'", "nbsp": " ", "lt": "<", "gt": ">"}
_ENTITY = re.compile(rf"&({'|'.join(_ENTITIES)});")


def plain_characters(text: str) -> str:
    """The text with line breaks, spaces and characters in place of their tags and entities."""
    shown = _BREAK.sub("\n", text.translate(_INVISIBLE))
    return _ENTITY.sub(lambda entity: _ENTITIES[entity[1]], shown)


def without_markup(text: str) -> str:
    """The text without the marks of Markdown, LaTeX and HTML; what they enclose stays."""
    return _MARKUP.sub("", text)
