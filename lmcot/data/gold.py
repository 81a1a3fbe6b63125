"""The right answers of a record, in the forms in which data sets list them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any, Final

from lmcot.data.values import BadRecord, composed, decoded, is_text

_ANSWERS = (
    "answer",
    "answers",
    "golden_answers",
    "gold_answers",
    "gold_answer",
    "possible_answers",
    "answer_aliases",
    "answer_alias",
)
"""Fields that hold right answers: the first one holds the main answer, the others aliases."""
_OTHERWISE = ("ground_truth", "target", "targets", "output")
"""Fields that are read only if a record has none of those: beside them they may hold a
prediction."""
ANSWERS = (*_ANSWERS, *_OTHERWISE)
"""All fields that may hold right answers."""
OPTIONS: Final = ("choices", "options", "candidates")
"""Fields that may hold the options of a question, one of which is right."""
_TEXTS = ("text", "value", "answer", "answers", "spans", "span", "number", "aliases",
          "normalized_aliases")  # fmt: skip
"""Keys that hold the texts of an answer that is an object: SQuAD, TriviaQA, KILT, DROP."""


def right_answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """All right answers, the main one first; answers that differ only in letter case are one.

    true and false are yes and no. A whole number with a decimal point (a year, as tables store it)
    is also right without it.

    Raises:
        BadRecord: if there is no answer.
    """
    fields = [name for name in _ANSWERS if record.get(name) is not None]
    fields = fields or [name for name in _OTHERWISE if record.get(name) is not None][:1]
    if not fields:
        raise BadRecord("the field 'answer' is missing")
    found: dict[str, str] = {}
    for name in fields:
        for answer in _texts(record.get(name), name):
            found.setdefault(" ".join(answer.casefold().split()), answer)
    if not found:
        raise BadRecord(f"the field '{fields[0]}' must hold an answer that is not empty")
    return tuple(found.values())


def with_answers(record: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """The record with these right answers alone."""
    return {**record, **dict.fromkeys(ANSWERS), "answer": list(answers)}


def _texts(value: object, field: str) -> Iterator[str]:
    value = decoded(value, lists_of_text_only=field == "answer")
    if value is None:
        return
    if isinstance(value, bool):
        yield "yes" if value else "no"
    elif isinstance(value, float | Decimal):
        yield from _number(value, field)
    elif isinstance(value, int | date):
        yield str(value)
    elif is_text(value):
        if value.strip():
            yield composed(value).strip()
    elif isinstance(value, Mapping):
        for name in _TEXTS:
            yield from _texts(value.get(name), field)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for one in value:
            yield from _texts(one, field)
    else:
        raise BadRecord(f"the field '{field}' must hold text, numbers, or lists of them")


def _number(value: float | Decimal, field: str) -> Iterator[str]:
    if not math.isfinite(value):
        raise BadRecord(f"the field '{field}' is not a finite number")
    whole = str(int(value)) if value == int(value) and abs(int(value)) < 10**15 else None
    # JSON keeps a number as it was written; in the other formats a float has no such form.
    written = str(value) if isinstance(value, Decimal) else json.dumps(value)
    if whole is not None and isinstance(value, float):
        yield whole
    yield written
    if whole is not None:
        yield whole
