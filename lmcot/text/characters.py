"""Characters that a terminal or a table would interpret: they are refused, replaced or escaped."""

from __future__ import annotations

import re

_CONTROL = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f"
"""All of ASCII's but tab, line feed and carriage return, as the inside of a pattern's class."""
_REFUSED = re.compile(f"[{_CONTROL}]")
_HIDDEN = re.compile(f"[{_CONTROL}\r\x80-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_printable(text: str) -> str:
    """The text, if it holds neither control characters nor halves of surrogate pairs.

    Raises:
        ValueError: naming the first one.
    """
    if found := _REFUSED.search(text):
        raise ValueError(f"holds the control character U+{ord(found[0]):04X}")
    if _SURROGATE.search(text):
        raise ValueError("holds half a surrogate pair")
    return text


def printable(text: str) -> str:
    """The text for a screen: each control character is replaced; tabs and line feeds stay."""
    return _HIDDEN.sub("\ufffd", text)


def markdown_cell(text: str) -> str:
    """The text as a cell of a Markdown table shows it literally."""
    return text.replace("|", "\\|")
