"""What the two models are asked, and what they tell: the records between them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lmcot.records import Answer, Failure, Paragraph


@dataclass(frozen=True, slots=True)
class Draw:
    """How rationales are sampled from the small LM."""

    samples: int
    max_tokens: int
    temperature: float
    seed: int
    tokens: bool
    """Whether each piece of text is told as soon as it is written."""
    deadline: float
    """Seconds from now."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"{self.samples} samples are asked for")


@dataclass(frozen=True, slots=True)
class Shown:
    """The part of the context that the models read. It is told first."""

    paragraphs: tuple[Paragraph, ...]
    prompt_tokens: int
    version: str
    """The policy that writes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of one rationale."""

    sample: int
    text: str


@dataclass(frozen=True, slots=True)
class Written:
    """A finished rationale."""

    sample: int
    text: str
    tokens: int
    finish_reason: str


Told = Shown | Piece | Written | Failure
"""What the small LM tells, one after the other."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants of an answer, besides that it be right."""

    instruction: str = ""
    """Instruction to the frozen LM: a client's system message."""
    max_tokens: int | None = None
    """Longest answer; what is beyond is cut off."""


@dataclass(frozen=True, slots=True)
class Query:
    """What the frozen LM is asked."""

    question: str
    paragraphs: tuple[Paragraph, ...]
    """The part of the context that the models read."""
    rationale: str | None
    """The rationale that guides it; None without guidance."""
    wish: Wish = Wish()
    first_answer: str = ""
    """What the frozen LM answered first, where the small LM advises on that."""


NOTHING_SAID = Answer("", "", 0, 0)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the frozen LM said to one prompt, or why it said nothing."""

    answer: Answer = NOTHING_SAID
    """The reply and the answer that was read out of it; empty if it failed."""
    failure: str | None = None
    version: str = ""
    """The model that answered."""

    @property
    def cut(self) -> bool:
        """Whether the answer may be longer: the reply, or the wished length, ended within it."""
        return self.answer.missing == "cut"


class Writer(Protocol):
    """The small LM, in this process or in another one."""

    async def fit_context(
        self, question: str, context: Sequence[Paragraph]
    ) -> tuple[Paragraph, ...]:
        """See `SmallLM.fit_context`."""

    def write(
        self, question: str, context: Sequence[Paragraph], draw: Draw, first_answer: str = ""
    ) -> AsyncGenerator[Told, None]:
        """See `SmallLM.write`."""


class Answerer(Protocol):
    """The frozen LM, in this process or in another one."""

    async def answer(self, query: Query) -> Reply:
        """See `FrozenLM.answer`."""

    async def answer_first(self, query: Query) -> Reply:
        """See `FrozenLM.answer_first`."""

    async def write_object(self, query: Query, answer: str, schema: str) -> Reply:
        """See `FrozenLM.write_object`."""
