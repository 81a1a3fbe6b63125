"""What is asked, checked against the limits of the settings, with all defaults filled in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from lmcot.answering.context import Context, parse_context
from lmcot.answering.exchange import Draw
from lmcot.answering.guidance import Ask
from lmcot.answering.refused import Refused
from lmcot.answering.schemas import AnswerRequest, Drawing, Passage
from lmcot.answering.structured import Form, read_form
from lmcot.config import Config
from lmcot.data.tasks import open_task
from lmcot.records import Paragraph

COLDEST = 1e-3
"""The lowest temperature that is not greedy."""


class Admission:
    """Admits what is within the limits of the settings."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.task = open_task(config.task)
        self.advises = config.prompts.advises

    def answer(
        self,
        request: AnswerRequest,
        ident: str,
        *,
        context: Context | Sequence[Passage],
        tokens: bool = False,
        spent: float = 0.0,
    ) -> Ask:
        """A request for an answer.

        Args:
            context: the request's, or what a program gives in its place.
            tokens: whether pieces of the rationales are wanted as they are written.
            spent: seconds of the deadline that are over.

        Raises:
            Refused: naming what makes no sense, or is beyond the limits.
        """
        form = _form(request)
        passages = self.context(request.question, context)
        draw = self.draw(request, tokens=tokens, spent=spent)
        return Ask(
            ident, request.question, passages, draw, request.unguided, form=form, task=self.task,
            advises=self.advises,
        )  # fmt: skip

    def context(self, question: str, given: Context | Sequence[Passage]) -> tuple[Paragraph, ...]:
        """The passages of a context.

        Raises:
            Refused: if it cannot be read, or is larger than the limits, or the question is.
        """
        limits = self._config.serve.limits
        if len(question) > limits.question_chars:
            raise Refused(
                f"the question has {len(question)} characters, more than {limits.question_chars}",
                param="question",
            )
        try:
            passages = parse_context(_plain(given))
        except ValueError as error:
            raise Refused(f"context: {error}", param="context") from None
        characters = len(given) if isinstance(given, str) else sum(map(_length, passages))
        for found, limit, what in (
            (characters, limits.context_chars, "characters"),
            (len(passages), limits.passages, "passages"),
        ):
            if found > limit:
                reason = f"the context has {found} {what}, more than {limit}"
                raise Refused(reason, param="context")
        return passages

    def draw(
        self,
        request: Drawing,
        *,
        tokens: bool = False,
        spent: float = 0.0,
        length_name: str = "max_tokens",
    ) -> Draw:
        """How rationales are sampled: the one place that knows what unset options mean.

        Args:
            length_name: what the request calls the longest rationale.

        Raises:
            Refused: naming the option that is beyond the limits.
        """
        limits, policy = self._config.serve.limits, self._config.policy
        longest = limits.new_tokens or 2 * policy.max_new_tokens
        length = request.max_tokens or policy.max_new_tokens
        if request.samples > limits.samples:
            reason = f"samples is {request.samples}, more than {limits.samples}"
            raise Refused(reason, param="samples")
        if length > longest:
            raise Refused(f"{length_name} is {length}, more than {longest}", param=length_name)
        temperature = request.temperature
        if temperature is None:
            temperature = self._config.evaluate.temperature if request.samples > 1 else 0.0
        if 0 < temperature < COLDEST:
            raise Refused(
                f"temperature is {temperature}: it must be 0, or at least {COLDEST}",
                param="temperature",
            )
        seed = _new_seed() if request.seed is None else request.seed
        left = self._config.serve.deadline_s - spent
        return Draw(request.samples, length, temperature, seed, tokens, left)


def _form(request: AnswerRequest) -> Form | None:
    if request.answer_schema is None:
        return None
    try:
        return read_form(request.answer_schema)
    except ValueError as error:
        raise Refused(str(error), param="answer_schema") from None


def _plain(given: Context | Sequence[Passage]) -> Context:
    """A context without the types of the HTTP API."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return given
    plain: list[Any] = [(one.title, one.text) if isinstance(one, Passage) else one for one in given]
    return plain


def _length(passage: Paragraph) -> int:
    """Characters of a passage, the spaces between its sentences included."""
    spaces = max(0, len(passage.sentences) - 1)
    return len(passage.title) + sum(map(len, passage.sentences)) + spaces


def _new_seed() -> int:
    """A seed for a request that names none."""
    return random.SystemRandom().getrandbits(62)
