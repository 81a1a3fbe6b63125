"""Records whose fields have other names, as the settings `columns` map them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from lmcot.config.data import Columns
from lmcot.data.gold import ANSWERS, OPTIONS
from lmcot.data.passages import CONTEXTS
from lmcot.data.values import BadRecord, decoded

_ABSENT: Final = object()
_REQUIRED: Final = ("answer", "choices", "context")


def renaming(
    columns: Columns, questions: Sequence[str], identities: Sequence[str]
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """A function that puts a record into the fields of docs/data.md.

    An object without a question may be one around records: it stays, without fields that hold a
    question by another name. A record with a question that lacks the column of its answer, options
    or context raises `BadRecord`.

    Args:
        questions: all fields that may hold a question.
        identities: all fields that may hold an id.
    """
    named = columns.named()
    replaced = {
        "question": questions, "id": identities, "answer": ANSWERS, "context": CONTEXTS,
        "choices": OPTIONS,
    }  # fmt: skip

    def renamed(record: Mapping[str, Any]) -> Mapping[str, Any]:
        found = {field: value_at(record, path) for field, path in named.items()}
        if found.get("choices") is _ABSENT and "," in named["choices"]:
            found["choices"] = _gathered(record, named["choices"])
        if found.get("question") is _ABSENT:
            return {name: value for name, value in record.items() if name not in questions}
        if "question" not in named and all(record.get(name) is None for name in questions):
            return record
        for field in _REQUIRED:
            if found.get(field) is _ABSENT:
                raise missing(field, named[field])
        dropped = {name for field in named for name in replaced.get(field, (field,))}
        kept = {name: value for name, value in record.items() if name not in dropped}
        return kept | {field: value for field, value in found.items() if value is not _ABSENT}

    return renamed


def _gathered(record: Mapping[str, Any], columns: str) -> object:
    """The values of several columns as a list; those at its end may be missing."""
    values = [value_at(record, one.strip()) for one in columns.split(",")]
    there = [one for one in values if one is not _ABSENT and one != ""]
    whole = there and values[: len(there)] == there
    return there if whole else _ABSENT


def missing(field: str, column: str) -> BadRecord:
    """What is wrong with a record that lacks the column of a field."""
    return BadRecord(
        f"the column '{column}' is missing, which data's columns.{field} names",
        "correct the record or the settings",
    )


def value_at(record: Mapping[str, Any], path: str) -> object:
    """The value at a dotted path, such as ``gold.text``; of a list, the values of its objects.

    A field that has the whole path as its name is that value. Text that spells a list or an object
    is read as one.
    """
    for name in (path, path.lower()):  # the names of a CSV file's columns are read in small letters
        if record.get(name) is not None:
            return record[name]
    value: object = record
    for part in path.split("."):
        value = _part(decoded(value), part)
        if value is _ABSENT:
            break
    return value


def _part(value: object, name: str) -> object:
    if isinstance(value, Mapping):
        found = value.get(name, value.get(name.lower()))
        return _ABSENT if found is None else found
    if isinstance(value, Sequence) and not isinstance(value, str):
        if name.isdigit():
            return value[int(name)] if int(name) < len(value) else _ABSENT
        parts = [part for one in value if (part := _part(decoded(one), name)) is not _ABSENT]
        return parts or _ABSENT
    return _ABSENT
