"""One record of a question-answering set, in any of the known layouts, becomes an `Example`.

`lmcot.data.gold` reads its right answers, `lmcot.data.passages` its context and supporting facts;
docs/data.md lists what is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lmcot.config.data import Columns
from lmcot.data.columns import renaming
from lmcot.data.gold import right_answers
from lmcot.data.passages import CONTEXTS, context_of, has_context
from lmcot.data.values import BadRecord, composed, decoded, is_text
from lmcot.records import Example

QUESTIONS = ("question", "query", "input")
"""Fields that hold a question; of several in a record, the first in this order is read."""
IDENTITIES = ("id", "_id", "qid", "question_id", "query_id", "uid", "guid")
"""Fields that hold a record's id, in the same way."""
DERIVED = "content-"
"""Prefix of ids that are derived from a record's content."""


Layout = Literal["lines", "array"]
"""JSON lines, or one JSON array."""


@dataclass(frozen=True, slots=True)
class Format:
    """What the settings say about a file of questions."""

    layout: Layout | None = None
    """How the file must be laid out; None: in any way that is recognised."""
    dataset: str = ""
    """The data set's name, for records that do not give it."""
    requires: tuple[str, ...] = ()
    """Fields that every record must have."""
    renamed: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """Puts a record with other fields into the fields of docs/data.md; it may raise `BadRecord`.
    It is also given the objects around records."""
    question: str = ""
    """The name of a table's column of questions, if it is another one."""


FORMATS: dict[str, Format] = {
    "auto": Format(),
    "jsonl": Format("lines"),
    "hotpotqa": Format("array", "hotpotqa"),
    "2wikimultihopqa": Format("array", "2wikimultihopqa"),
    "musique": Format("lines", "musique", requires=("paragraphs",)),
}
"""Each format by its name in the settings (`lmcot.config.data.FileFormat`)."""


def with_columns(format: Format, columns: Columns) -> Format:
    """The format of a file whose fields have the names that the settings give."""
    if not columns.named():
        return format
    renamed = renaming(columns, QUESTIONS, IDENTITIES)
    return replace(format, renamed=renamed, question=columns.question or "")


def parse_record(
    record: object,
    dataset: str = "",
    requires: Sequence[str] = (),
    *,
    require_context: bool = True,
) -> Example:
    """The `Example` that a record holds.

    A record without an id gets an id that is derived from its content, and so never changes.

    Args:
        dataset: the data set's name, if the record does not give it.
        requires: fields that the record must have.
        require_context: whether a record without a context is bad.

    Raises:
        BadRecord: if a field is missing or malformed.
    """
    if not isinstance(record, Mapping):
        raise BadRecord("a record must be a JSON object")
    missing = next((name for name in requires if name not in record), None)
    if missing is not None:
        raise BadRecord(f"the field '{missing}' is missing")
    if record.get("answerable") is False or record.get("is_impossible") is True:
        raise BadRecord("the question is marked as not answerable")
    try:
        record = _with_metadata(record)
        question = _question(record)
        answer, *aliases = right_answers(record)
        context, facts = context_of(record) if require_context or has_context(record) else ((), ())
        told = _facts(record)
    except RecursionError:
        raise BadRecord("the record is nested too deeply") from None
    content = (question, answer, *aliases, *((p.title, *p.sentences) for p in context))
    return Example(
        id=_identity(record) or _derived(content),
        question=question,
        answer=answer,
        context=context,
        supporting_facts=facts,
        type=_label(record, "type"),
        level=_label(record, "level"),
        dataset=_label(record, "dataset") or dataset or _guess_dataset(record),
        aliases=tuple(aliases),
        facts=told,
    )


def holds_question(record: Mapping[str, Any]) -> bool:
    """Whether an object looks like a record, rather than like an object around records."""
    return any(isinstance(record.get(name), str | Mapping) for name in QUESTIONS)


def _with_metadata(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with what FlashRAG's files put below ``metadata``."""
    metadata = decoded(record.get("metadata"))
    if not isinstance(metadata, Mapping):
        return record
    names = (*CONTEXTS, "supporting_facts", "answer_aliases", "evidences", "type", "level")
    missing = {name: metadata[name] for name in names if metadata.get(name) is not None}
    return {**missing, **{name: value for name, value in record.items() if value is not None}}


def _question(record: Mapping[str, Any]) -> str:
    field = next((name for name in QUESTIONS if record.get(name) is not None), None)
    if field is None:
        raise BadRecord("the field 'question' is missing")
    value = record[field]
    if isinstance(value, Mapping):  # Natural Questions
        value = value.get("text")
    if not is_text(value) or not value.strip():
        raise BadRecord(f"the field '{field}' must be a non-empty string")
    return composed(value)


def _facts(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Supporting facts that are text: the field ``solution``, a text or a list of texts."""
    value = decoded(record.get("solution"))
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(map(is_text, found)):
        return ()
    return tuple(" ".join(composed(one).split()) for one in found if one.strip())


def _identity(record: Mapping[str, Any]) -> str:
    """The record's own id, as text; empty if it has none."""
    field = next((name for name in IDENTITIES if record.get(name) not in (None, "")), None)
    if field is None:
        return ""
    value = record[field]
    if isinstance(value, Mapping) and is_text(value.get("$oid")):  # as MongoDB exports it
        value = value["$oid"]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not is_text(value) or not value.strip():
        raise BadRecord(f"the field '{field}' must be a non-empty string or a whole number")
    return value


def _derived(content: object) -> str:
    text = json.dumps(content, ensure_ascii=False)
    return DERIVED + hashlib.sha256(text.encode()).hexdigest()[:16]


def _label(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    return value if isinstance(value, str) else ""


def _guess_dataset(record: Mapping[str, Any]) -> str:
    if "question_decomposition" in record or "answerable" in record:
        return "musique"
    if "evidences" in record:
        return "2wikimultihopqa"
    return "hotpotqa" if "_id" in record and "supporting_facts" in record else ""
