"""Reads the values of a record: text, lists that are written as text, and bad values."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
import warnings
from decimal import Decimal
from typing import Any, TypeGuard

_SURROGATE = re.compile("[\ud800-\udfff]")
DECODER = json.JSONDecoder(parse_float=Decimal)
"""A decoder that keeps numbers with a fraction as they are written."""


class BadRecord(Exception):
    """A record that is not a usable question; the message says what is wrong with it."""

    def __init__(self, problem: str, remedy: str = "correct the record") -> None:
        super().__init__(problem)
        self.remedy = remedy


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a string that a tokenizer accepts: JSON can contain lone surrogates."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def composed(text: str) -> str:
    """The text in Unicode's composed form, so that equal texts are equal strings."""
    return unicodedata.normalize("NFC", text)


def decoded(value: object, *, lists_of_text_only: bool = False) -> object:
    """The list or object that a string spells, as JSON or as Python writes it; else the value.

    Tables with one value per cell (CSV) and some public data sets hold lists in this form.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    found = _parsed(value.strip())
    if lists_of_text_only and not _is_list_of_text(found):
        return value
    return value if found is None else found


def _parsed(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
            found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list | dict) else None


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
