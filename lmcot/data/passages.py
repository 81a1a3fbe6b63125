"""The context of a record and its supporting facts, in the forms in which data sets write them.

A context is a list of passages, a mapping of columns, a mapping of titles to texts, one text, or
any of these as a string of JSON. A passage is a title with its sentences or its text, or a text. A
text is split into sentences here, so that facts which name a sentence of it by number cannot be
trusted: they then support the whole passage.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, TypeGuard

from lmcot.data.gold import OPTIONS
from lmcot.data.values import BadRecord, composed, decoded, is_text
from lmcot.records import Paragraph, SupportingFact
from lmcot.text.sentences import split_sentences

CONTEXTS = (
    "context",
    "contexts",
    "paragraphs",
    "passages",
    "passage",
    "ctxs",
    "documents",
    "docs",
    "retrieval_result",
)
"""Fields that hold a context; of several in a record, the first in this order is read."""
_TITLES = ("title", "name", "heading")
_BODIES = ("sentences", "content", "text", "paragraph_text", "passage_text", "contents", "passage",
           "paragraph", "body", "context", "snippet")  # fmt: skip
_MARKS = ("is_supporting", "is_selected", "supporting")
"""Fields that mark a whole passage as supporting: MuSiQue, MS MARCO."""
_INDICES = ("sent_id", "sentence_id", "sent_idx", "sentence_index")
_NUMBERED = re.compile(r"^Passage \d+:[ \t]*\n", re.MULTILINE)
"""Separates the passages of LongBench's contexts, whose first lines are titles."""
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class _Passage:
    title: str
    sentences: tuple[str, ...]
    whole: bool
    """Whether the passage came as one text."""
    supports: bool = False


def context_of(
    record: Mapping[str, Any],
) -> tuple[tuple[Paragraph, ...], tuple[SupportingFact, ...]]:
    """The passages of a record, and what its supporting facts point at.

    Where facts point at passages rather than titles (MuSiQue's marks, a ``para_idx``), later
    passages of the same title are renamed ``Title (2)`` and so on, so that facts stay exact.

    Raises:
        BadRecord: if there is no context, or it cannot be read.
    """
    field = next((name for name in CONTEXTS if record.get(name) is not None), None)
    if field is None:
        raise BadRecord(
            "the field 'context' is missing: a question of the task extractive_qa is answered from "
            "passages that come with it",
            f"correct the record, name another task ({_likely_task(record)}; docs/tasks.md), "
            "set data.require_context to false if the questions come without passages",
        )
    passages = _passages(record, field)
    facts = _rows(record, "supporting_facts") if record.get("supporting_facts") is not None else []
    if any(p.supports for p in passages) or any(_has(row, "para_idx") for row in facts):
        passages = _with_unique_titles(passages)
    found = [_fact(row, number, passages) for number, row in enumerate(facts, 1)]
    found += [(passage.title, None) for passage in passages if passage.supports]
    if not any(sentence.strip() for passage in passages for sentence in passage.sentences):
        raise BadRecord("the context holds no text")
    context = tuple(Paragraph(passage.title, passage.sentences) for passage in passages)
    return context, tuple(_exact(found, passages))


def _likely_task(record: Mapping[str, Any]) -> str:
    """How to name the task that the record's answer looks like one of."""
    given = record.get("answer", record.get("label"))
    words = str(given).strip().lower()
    if any(record.get(name) is not None for name in OPTIONS):
        return "--task multiple_choice: it has options"
    if isinstance(given, bool) or words in ("true", "false", "yes", "no"):
        return f"--task boolean: the answer is {words}"
    if "####" in words or re.fullmatch(r"-?[\d.,]+", words):
        return "--task numeric: the answer is a number"
    return "--task NAME"


def has_context(record: Mapping[str, Any]) -> bool:
    """Whether a record has a context that is not empty."""
    return any(record.get(name) not in (None, "", [], {}) for name in CONTEXTS)


def _passages(record: Mapping[str, Any], field: str) -> list[_Passage]:
    value = decoded(record[field])
    if isinstance(value, str):
        return _of_text(value, record.get("title"), field)
    if isinstance(value, Mapping):
        named = isinstance(_first(value, _TITLES), str) or isinstance(_first(value, _BODIES), str)
        if named:
            value = [value]
        elif not value.keys() & {*_TITLES, *_BODIES} and all(map(_is_body, value.values())):
            value = list(value.items())
    rows = _rows({field: value}, field)
    return [_passage(entry, number) for number, entry in enumerate(rows, 1)]


def _of_text(text: str, title: object, field: str) -> list[_Passage]:
    if not is_text(text) or not text.strip():
        raise BadRecord(f"the field '{field}' is empty")
    numbered = [part.strip() for part in _NUMBERED.split(text) if part.strip()]
    if _NUMBERED.match(text):
        return [_text_passage(*_titled(part)) for part in numbered]
    if is_text(title) and title.strip():
        return [_text_passage(title, text)]
    return [_text_passage("", block) for block in text_blocks(text)]


def _titled(text: str) -> tuple[str, str]:
    """The first line as the title, and the text after it; no title if there is only one line."""
    title, _, rest = text.partition("\n")
    return (title.strip().strip('"'), rest) if rest.strip() else ("", text)


def text_blocks(text: str) -> list[str]:
    """The passages of a text: its blocks between blank lines."""
    return [block for block in _BLANK_LINES.split(text) if block.strip()]


def text_paragraph(title: str, text: str) -> Paragraph:
    """A passage that comes as one text, split into sentences; its line breaks become spaces."""
    return Paragraph(composed(title), tuple(split_sentences(" ".join(composed(text).split()))))


def _text_passage(title: str, text: str, *, supports: bool = False) -> _Passage:
    found = text_paragraph(title, text)
    return _Passage(found.title, found.sentences, whole=True, supports=supports)


def _passage(entry: object, number: int) -> _Passage:
    entry = decoded(entry)
    if isinstance(entry, str):
        entry = {"text": entry}
    if isinstance(entry, Mapping) and isinstance(entry.get("document"), Mapping):
        entry = entry["document"]
    title: object
    if isinstance(entry, Mapping):
        title, body = _first(entry, _TITLES), _first(entry, _BODIES)
        if title is None and isinstance(entry.get("contents"), str):
            title, body = _titled(entry["contents"])
    elif isinstance(entry, Sequence) and len(entry) == 2:
        title, body = entry
    else:
        title = body = None
    title = "" if title is None else title
    supports = isinstance(entry, Mapping) and _first(entry, _MARKS) in (True, 1)
    if is_text(title) and is_text(body):
        return _text_passage(title, body, supports=supports)
    if not is_text(title) or not _is_sentences(body):
        raise BadRecord(
            f"paragraph {number} of the context must be a title and a list of sentences, or a "
            "title and a text"
        )
    sentences = tuple(composed(one or "") for one in body)
    return _Passage(composed(title), sentences, whole=False, supports=supports)


def _fact(row: object, number: int, passages: Sequence[_Passage]) -> tuple[str, int | None]:
    """The title and the sentence that a fact names; None for the whole passage."""
    if is_text(row):
        return composed(row), None
    if isinstance(row, Mapping):
        title, sentence = row.get("title"), _first(row, _INDICES)
    elif isinstance(row, Sequence) and len(row) == 2:
        title, sentence = row
    else:
        title = sentence = None
    if isinstance(sentence, float | Decimal) and sentence == sentence // 1:
        sentence = int(sentence)  # a table's column of whole numbers that some rows lack
    if not is_text(title) or not (sentence is None or _is_index(sentence)):
        raise BadRecord(f"supporting fact {number} must be a title and a sentence's index")
    if isinstance(row, Mapping) and _has(row, "para_idx"):
        index = row["para_idx"]
        if not _is_index(index) or index >= len(passages):
            raise BadRecord(f"supporting fact {number} has a para_idx outside the context")
        title = passages[index].title
    return composed(title), sentence


def _exact(
    found: Sequence[tuple[str, int | None]], passages: Sequence[_Passage]
) -> dict[SupportingFact, None]:
    """Facts that name single sentences, each once; a whole passage becomes all its sentences."""
    whole = {passage.title for passage in passages if passage.whole}
    facts: dict[SupportingFact, None] = {}
    for title, index in found:
        if index is not None and title not in whole:
            facts[SupportingFact(title, index)] = None
            continue
        for passage in passages:
            if passage.title == title:
                facts |= {SupportingFact(title, i): None for i in range(len(passage.sentences))}
    return facts


def _with_unique_titles(passages: Sequence[_Passage]) -> list[_Passage]:
    passages = [
        one if one.title else replace(one, title=f"Passage {number}")
        for number, one in enumerate(passages, 1)
    ]
    used = {one.title for one in passages}
    seen: set[str] = set()
    unique = []
    for one in passages:
        title = one.title
        if title in seen:
            titles = (f"{title} ({copy})" for copy in itertools.count(2))
            title = next(candidate for candidate in titles if candidate not in used)
            used.add(title)
        seen.add(one.title)
        unique.append(replace(one, title=title))
    return unique


def _rows(record: Mapping[str, Any], field: str) -> list[Any]:
    """The entries of a list field; a mapping of columns is turned into such a list."""
    value = decoded(record.get(field))
    if isinstance(value, Mapping):
        columns = {name: one for name, one in value.items() if one is not None}
        lists = [one for one in columns.values() if isinstance(one, list)]
        if len(lists) < len(columns) or len({len(one) for one in lists}) > 1:
            raise BadRecord(f"the columns of '{field}' must be lists of the same length")
        value = [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
    if not isinstance(value, list | tuple):
        raise BadRecord(f"the field '{field}' must be a list")
    if not value and field != "supporting_facts":
        raise BadRecord(f"the field '{field}' is empty")
    return list(value)


def _first(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _has(entry: object, key: str) -> bool:
    return isinstance(entry, Mapping) and entry.get(key) is not None


def _is_body(value: object) -> bool:
    return isinstance(value, str) or _is_sentences(value)


def _is_sentences(value: object) -> TypeGuard[Sequence[str | None]]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return is_list and all(one is None or is_text(one) for one in value)  # type: ignore[attr-defined]


def _is_index(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
