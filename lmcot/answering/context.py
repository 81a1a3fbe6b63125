"""A context that a user gives, as the passages that the models read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmcot.data.passages import text_blocks, text_paragraph
from lmcot.records import Paragraph
from lmcot.text.characters import check_printable

Context = str | Sequence[Mapping[str, str] | tuple[str, str] | Paragraph]
"""A text, or passages: ``{"title", "text"}``, pairs of the two, or paragraphs."""


def parse_context(context: Context) -> tuple[Paragraph, ...]:
    """The passages of a context, as training reads them from a data set.

    A text has one passage for each block between blank lines. A `Paragraph` keeps its sentences;
    any other passage is split into sentences here.

    Raises:
        ValueError: if a passage has neither title nor text, or cannot be read.
    """
    if isinstance(context, str):
        check_printable(context)
        return tuple(text_paragraph("", block) for block in text_blocks(context))
    if not isinstance(context, Sequence):
        raise ValueError("is neither a text nor a list of passages")
    return tuple(_passage(one, number) for number, one in enumerate(context, 1))


def _passage(one: Any, number: int) -> Paragraph:
    if isinstance(one, Paragraph):
        title, parts = one.title, one.sentences
    else:
        title, text = _title_and_text(one, number)
        parts = (text,)
    for text in (title, *parts):
        if not isinstance(text, str):
            raise ValueError(f"passage {number} holds something that is not a text")
        check_printable(text)
    if not any(text.strip() for text in (title, *parts)):
        raise ValueError(f"passage {number} has neither title nor text: leave it out")
    return one if isinstance(one, Paragraph) else text_paragraph(title.strip(), parts[0])


def _title_and_text(one: Any, number: int) -> tuple[Any, Any]:
    if isinstance(one, Mapping):
        if "text" not in one:
            raise ValueError(f"passage {number} needs a 'text'; a 'title' is optional")
        return one.get("title", ""), one["text"]
    if isinstance(one, Sequence) and not isinstance(one, str) and len(one) == 2:
        return one[0], one[1]
    raise ValueError(f"passage {number} is neither a mapping with a 'text' nor a title and a text")
