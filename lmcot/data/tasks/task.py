"""A task: extractive question answering as it stands, and the functions that other tasks change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from lmcot.errors import UserError
from lmcot.records import Answer, Completion, Example
from lmcot.text.answers import best, contains_gold, exact_match, f1, inclusion, normalize_answer
from lmcot.text.reading import Reading, read_answer, read_text


@dataclass(frozen=True, slots=True)
class Scores:
    """What an answer is worth, each from 0 to 1; where there are several right answers, the best
    over them."""

    em: float
    """Whether it is right: 0 or 1."""
    f1: float
    """How near it comes to a right answer; the same as ``em`` where nothing lies between."""
    inclusion: float
    """Whether it contains a right answer: 0 or 1."""

    def __post_init__(self) -> None:
        for name in ("em", "f1", "inclusion"):
            value = getattr(self, name)
            if not 0 <= value <= 1:  # NaN compares false
                raise UserError(f"the task's {name} is {value!r}, which is not from 0 to 1: fix it")

    @classmethod
    def right(cls, right: bool) -> Scores:
        """The scores of an answer that is either right or wrong."""
        return cls(float(right), float(right), float(right))


class Task:
    """What a question is, and how its answer is read and compared, for rewards, teachers,
    evaluation and service alike.

    This class is the task ``extractive_qa``; the others derive from it, and so does a task of the
    user's own.
    """

    note = ""
    """A sentence for the report on what its figures mean, where they are not those of words."""

    def fields(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """A record of a file, in the fields of docs/data.md.

        Raises:
            BadRecord: if it is not a question of this task.
        """
        return record

    def read(self, text: str, question: str, *, cut: bool = False) -> Reading:
        """The answer in what a model wrote, in the form in which it is compared and shown.

        Args:
            cut: whether a limit of tokens ended the text.
        """
        return read_text(text, cut=cut)

    def scores(self, answer: str, example: Example) -> Scores:
        """Compares an answer that was read with the right ones."""
        golds = example.answers
        return Scores(
            best(exact_match, answer, golds),
            best(f1, answer, golds),
            best(inclusion, answer, golds),
        )

    def contains(self, rationale: str, example: Example) -> bool:
        """Whether a rationale holds a right answer, as a good one should."""
        return contains_gold(rationale, example.answers)

    def mentions(self, text: str, example: Example) -> Sequence[str]:
        """The right answers in the spellings in which a text may hold them; the controls that mask
        the answer mask these."""
        return example.answers

    def options(self, question: str) -> Sequence[str]:
        """The answers that a question leaves to choose from, as the frozen LM writes them; empty
        where it leaves all."""
        return ()

    def key(self, answer: str) -> str:
        """The form of an answer in a vote: answers with the same form are one."""
        return normalize_answer(answer)

    def answer(self, reply: Completion, question: str) -> Answer:
        """The answer in a reply of the frozen LM."""
        return read_answer(reply, partial(self.read, question=question))

    def stated(self, rationale: str, question: str) -> str:
        """The answer that a rationale itself comes to; empty if it states none."""
        found = self.read(rationale, question)
        return found.answer if found.stated else ""


EXTRACTIVE_QA: Final = Task()
"""The task of short answers in words."""
