"""One record of a question-answering set, in any of the known layouts, becomes an `Example`.

The layouts differ in how they write the context and the supporting facts:

- lmcot's JSON lines: ``context: [{title, sentences}]``, ``supporting_facts: [{title, sent_id}]``;
- HotpotQA and 2WikiMultiHopQA: ``context: [[title, sentences]]``, ``[[title, sent_id]]``;
- the hub's tables: a mapping of columns, ``context: {title: [...], sentences: [[...]]}``;
- MuSiQue: ``paragraphs: [{title, paragraph_text, is_supporting}]``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from lmcot.data.sentences import split_sentences
from lmcot.records import Example, Paragraph, SupportingFact


class BadRecord(Exception):
    """A record that is not a usable question; the message says what is wrong with it."""


def parse_record(record: object, dataset: str = "") -> Example:
    """The `Example` that a record holds.

    ``dataset`` names the set if the record does not; ``musique`` asks for MuSiQue's layout.

    In MuSiQue, and wherever supporting facts bear a ``para_idx``, facts point at paragraphs
    rather than titles; later paragraphs of the same title are then renamed ``Title (2)`` and so
    on, so that facts stay exact. MuSiQue marks whole paragraphs as supporting: every sentence of
    such a paragraph becomes a supporting fact.

    Raises:
        BadRecord: if a field is missing or malformed.
    """
    if not isinstance(record, Mapping):
        raise BadRecord("a record must be a JSON object")
    identity = _text(record, "_id" if "_id" in record and "id" not in record else "id")
    question, answer = _text(record, "question"), _text(record, "answer")
    if "paragraphs" in record or dataset == "musique":
        context, facts = _musique(record)
    else:
        context = [_paragraph(e, n) for n, e in enumerate(_rows(record, "context"), 1)]
        context, facts = _facts(record, context)
    if not any(sentence.strip() for paragraph in context for sentence in paragraph.sentences):
        raise BadRecord("the context holds no text")
    return Example(
        id=identity,
        question=question,
        answer=answer,
        context=tuple(context),
        supporting_facts=tuple(facts),
        type=_label(record, "type"),
        level=_label(record, "level"),
        dataset=_label(record, "dataset") or dataset or _guess_dataset(record),
    )


_SURROGATE = re.compile("[\ud800-\udfff]")


def _musique(record: Mapping[str, Any]) -> tuple[list[Paragraph], list[SupportingFact]]:
    if record.get("answerable") is False:
        raise BadRecord("the question is marked as not answerable (MuSiQue-Full)")
    context, supporting = [], []
    for number, row in enumerate(_rows(record, "paragraphs"), 1):
        if not isinstance(row, Mapping):
            raise BadRecord(f"paragraph {number} must be an object with title and paragraph_text")
        title, text = row.get("title"), row.get("paragraph_text")
        if not _is_text(title) or not _is_text(text):
            raise BadRecord(f"paragraph {number} must have the strings title and paragraph_text")
        context.append(Paragraph(title, tuple(split_sentences(text))))
        supporting.append(row.get("is_supporting") is True)
    context = _with_unique_titles(context)
    facts = [
        SupportingFact(paragraph.title, index)
        for paragraph, is_supporting in zip(context, supporting, strict=True)
        if is_supporting
        for index in range(len(paragraph.sentences))
    ]
    return context, facts


def _paragraph(entry: object, number: int) -> Paragraph:
    title, sentences = _pair(entry, "title", "content" if _has(entry, "content") else "sentences")
    is_list = isinstance(sentences, Sequence) and not isinstance(sentences, str)
    if not _is_text(title) or not is_list or not all(map(_is_text, sentences)):
        raise BadRecord(
            f"paragraph {number} of the context must be a title and a list of sentences"
        )
    return Paragraph(title, tuple(sentences))


def _facts(
    record: Mapping[str, Any], context: list[Paragraph]
) -> tuple[list[Paragraph], list[SupportingFact]]:
    if record.get("supporting_facts") is None:
        return context, []
    rows = _rows(record, "supporting_facts")
    if any(_has(row, "para_idx") for row in rows):
        context = _with_unique_titles(context)
    facts = []
    for number, row in enumerate(rows, 1):
        title, sent_id = _pair(row, "title", "sent_id")
        if not _is_text(title) or not _is_index(sent_id):
            raise BadRecord(f"supporting fact {number} must be a title and a sentence's index")
        if _has(row, "para_idx"):
            title = _title_at(context, row["para_idx"], number)
        facts.append(SupportingFact(title, sent_id))
    return context, facts


def _title_at(context: list[Paragraph], index: object, number: int) -> str:
    if not _is_index(index) or index >= len(context):
        raise BadRecord(f"supporting fact {number} has a para_idx outside the context")
    return context[index].title


def _with_unique_titles(context: list[Paragraph]) -> list[Paragraph]:
    used = {paragraph.title for paragraph in context}
    seen: set[str] = set()
    unique = []
    for paragraph in context:
        title = paragraph.title
        if title in seen:
            titles = (f"{title} ({copy})" for copy in itertools.count(2))
            title = next(candidate for candidate in titles if candidate not in used)
            used.add(title)
        seen.add(paragraph.title)
        unique.append(Paragraph(title, paragraph.sentences))
    return unique


def _rows(record: Mapping[str, Any], field: str) -> list[Any]:
    """The entries of a list field; a mapping of columns is turned into such a list."""
    value = record.get(field)
    if value is None:
        raise BadRecord(f"the field '{field}' is missing")
    if isinstance(value, Mapping):
        columns = list(value.values())
        if not all(isinstance(c, list) for c in columns) or len({len(c) for c in columns}) > 1:
            raise BadRecord(f"the columns of '{field}' must be lists of the same length")
        value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise BadRecord(f"the field '{field}' must be a list")
    if not value and field != "supporting_facts":
        raise BadRecord(f"the field '{field}' is empty")
    return value


def _pair(entry: object, first: str, second: str) -> tuple[Any, Any]:
    """Two values, written as an object with these keys or as a pair; (None, None) if neither."""
    if isinstance(entry, Mapping):
        return entry.get(first), entry.get(second)
    if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 2:
        return entry[0], entry[1]
    return None, None


def _has(entry: object, key: str) -> bool:
    return isinstance(entry, Mapping) and entry.get(key) is not None


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        raise BadRecord(f"the field '{field}' is missing")
    if not _is_text(value) or not value.strip():
        raise BadRecord(f"the field '{field}' must be a non-empty string")
    return value


def _label(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    return value if isinstance(value, str) else ""


def _guess_dataset(record: Mapping[str, Any]) -> str:
    if "paragraphs" in record:
        return "musique"
    if "evidences" in record:
        return "2wikimultihopqa"
    return "hotpotqa" if "_id" in record else ""


def _is_text(value: object) -> TypeGuard[str]:
    # JSON can spell lone surrogates ("\ud800"), which no tokenizer takes.
    return isinstance(value, str) and not _SURROGATE.search(value)


def _is_index(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
