"""What a conversation asks: the question, what it is answered from, how it is to be answered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lmcot.answering.refused import Refused
from lmcot.serve.dspy_form import FieldsWanted, objective_of, read_fields, split_wish
from lmcot.serve.openai_schemas import ChatMessage

_LABEL = re.compile(
    r"^[ \t]*(?:\*\*)?(context|question|answer)(?:\*\*)?[ \t]{0,8}:(?:\*\*)?",
    re.IGNORECASE | re.MULTILINE,
)
"""The label of a part of a text: "Context: ...", "Question: ...", "Answer:"."""
_QUESTIONS = ("question", "query")
_UNTITLED = ("context", "passages", "documents")


@dataclass(frozen=True, slots=True)
class Asked:
    """The question that a conversation asks, and what belongs to it."""

    question: str
    context: tuple[tuple[str, str], ...] = ()
    """Titles and texts."""
    instructions: tuple[str, ...] = ()
    """Instructions to the frozen LM."""
    fields: FieldsWanted | None = None
    """Fields that the reply must have, if the question names them."""


def read_conversation(messages: Sequence[ChatMessage]) -> Asked:
    """Reads a conversation, in time linear in its length.

    The last user message is the question, perhaps with a context; earlier messages are context;
    system messages are instructions.

    Raises:
        Refused: if there is no user message, or it says nothing.
    """
    texts = [(one.role, _text(one, number)) for number, one in enumerate(messages)]
    last = max((at for at, (role, _) in enumerate(texts) if role == "user"), default=None)
    if last is None:
        raise Refused(
            "messages holds no user message: the last one is the question", param="messages"
        )
    instructions = [objective_of(text) for role, text in texts if role in ("system", "developer")]
    said = [("", text) for role, text in texts[:last] if role not in ("system", "developer")]
    asked = read_question(texts[last][1])
    if not asked.question:
        raise Refused(
            "the last user message is empty: it is the question", param=f"messages.{last}.content"
        )
    return Asked(
        asked.question,
        tuple(one for one in (*said, *asked.context) if one[1].strip()),
        tuple(one.strip() for one in (*instructions, *asked.instructions) if one.strip()),
        asked.fields,
    )


def read_question(text: str) -> Asked:
    """Reads a question, alone or with its context.

    The context is labelled ("Context: ...", then "Question: ..." or the other way round), or both
    are in dspy's fields. What stands before a labelled context is an instruction.
    """
    if found := read_fields(text):
        return _of_fields(found)
    labels = list(_LABEL.finditer(text))
    at = max((n for n, one in enumerate(labels) if _names(one, "question")), default=None)
    if at is None:
        return Asked(text.strip())
    label = labels[at]
    before = next((one for one in labels[:at] if _names(one, "context")), None)
    behind = next((one for one in labels[at:] if _names(one, "context")), None)
    question = text[label.end() : behind.start() if behind else len(text)]
    above, context = text[: label.start()], []
    if before:
        context.append(text[before.end() : label.start()])
        above = text[: before.start()]
    if behind:
        context.append(_without_answer(text[behind.end() :]))
    if not context:  # then it is the context that stands above the question
        context, above = [above], ""
    passages = tuple(("", one.strip()) for one in context if one.strip())
    return Asked(_without_answer(question), passages, (above.strip(),) if above.strip() else ())


def _names(label: re.Match[str], part: str) -> bool:
    return label[1].lower() == part


def _without_answer(text: str) -> str:
    """The text without a last line "Answer:", which a reply would complete."""
    bare = text.strip()
    head, _, line = bare.rpartition("\n")
    label = _LABEL.fullmatch(line.strip())
    return head.rstrip() if label and _names(label, "answer") else bare


def _of_fields(found: list[tuple[str, str]]) -> Asked:
    """The question among dspy's fields, or the last one; the others are its context."""
    name, last = found[-1]
    body, wanted = split_wish(last)
    fields = [*found[:-1], (name, body)]
    at = next((n for n, (name, _) in enumerate(fields) if name in _QUESTIONS), len(fields) - 1)
    context = tuple(
        ("" if name in _UNTITLED else name.replace("_", " "), body)
        for number, (name, body) in enumerate(fields)
        if number != at and body
    )
    return Asked(fields[at][1], context, fields=wanted)


def _text(message: ChatMessage, number: int) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for place, part in enumerate(message.content):
        param = f"messages.{number}.content.{place}"
        if part.get("type") != "text":
            raise Refused("a message holds a part that is not text", param=param)
        if not isinstance(part.get("text"), str):
            raise Refused("a text part of a message holds no text", param=param)
        texts.append(part["text"])
    return "\n".join(texts)
