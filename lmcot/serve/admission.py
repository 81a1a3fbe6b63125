"""What requests ask, checked against the limits, with all defaults filled in."""

from __future__ import annotations

from collections.abc import Sequence

from lmcot.answering.guidance import Ask, Refused
from lmcot.answering.schemas import AnswerRequest, Drawing, Question, RationaleRequest
from lmcot.answering.small_lm import Draw, new_seed
from lmcot.answering.structured import read_form
from lmcot.config import Config
from lmcot.serve.chat import Chat, read_chat
from lmcot.serve.guard import spent
from lmcot.serve.openai_schemas import ChatRequest

_COLDEST = 1e-3
"""The lowest temperature that is not greedy."""


class Admission:
    """Admits requests within the limits of the settings."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def answer(self, request: AnswerRequest, ident: str, *, tokens: bool) -> Ask:
        """A request for an answer.

        Raises:
            Refused: naming what is beyond them.
        """
        form = None
        if request.answer_schema is not None:
            try:
                form = read_form(request.answer_schema)
            except ValueError as error:
                raise Refused(422, str(error), param="answer_schema") from None
        context, draw = self._context(request), self._draw(request, tokens)
        return Ask(ident, request.question, context, draw, request.unguided, form=form)

    def chat(self, request: ChatRequest, ident: str) -> tuple[Chat, Ask]:
        """The same for a chat completion, of whose answer a client may say how long it may be.

        Raises:
            Refused: naming what is beyond the limits, or not offered.
        """
        chat = read_chat(request, self._config.serve.name)
        asked, limits = chat.asked, self._config.serve.limits
        context = [
            (title, block)
            for title, text in asked.context
            for block in text.split("\n\n")
            if block.strip()
        ]
        self._check_size(asked.question, context)
        instruction = len(chat.wish.instruction)
        if instruction > limits.instruction_chars:
            raise Refused(
                422, f"the system messages have {instruction} characters, more than "
                f"{limits.instruction_chars}", param="messages",
            )  # fmt: skip
        drawing = Drawing(
            samples=request.samples,
            max_tokens=request.max_rationale_tokens,
            temperature=None if request.temperature is None else
            (0.0 if request.temperature < _COLDEST else request.temperature),
            seed=abs(request.seed) % 2**63 if request.seed is not None else None,
        )  # fmt: skip
        # The tokens of several rationales would come in a mixture.
        tokens = request.stream and request.samples == 1
        draw = self._draw(drawing, tokens, "max_rationale_tokens")
        return chat, Ask(ident, asked.question, context, draw, wish=chat.wish, form=chat.form)

    def rationale(self, request: RationaleRequest) -> tuple[list[tuple[str, str]], Draw]:
        """The context, and how rationales are drawn.

        Raises:
            Refused: as `answer` does.
        """
        return self._context(request), self._draw(request, tokens=False)

    def _context(self, request: Question) -> list[tuple[str, str]]:
        if isinstance(request.context, str):
            passages = [("", one) for one in request.context.split("\n\n") if one.strip()]
        else:
            passages = [(one.title, one.text) for one in request.context]
        self._check_size(request.question, passages)
        return passages

    def _check_size(self, question: str, passages: Sequence[tuple[str, str]]) -> None:
        limits = self._config.serve.limits
        characters = sum(len(title) + len(text) for title, text in passages)
        for what, found, limit in (
            ("question", len(question), limits.question_chars),
            ("context", characters, limits.context_chars),
        ):
            if found > limit:
                raise Refused(422, f"the {what} has {found} characters, more than {limit}")
        if len(passages) > limits.passages:
            raise Refused(422, f"the context has {len(passages)} passages, over {limits.passages}")

    def _draw(self, request: Drawing, tokens: bool, length_name: str = "max_tokens") -> Draw:
        limits, policy = self._config.serve.limits, self._config.policy
        longest = limits.new_tokens or 2 * policy.max_new_tokens
        length = request.max_tokens or policy.max_new_tokens
        if request.samples > limits.samples:
            reason = f"samples is {request.samples}, more than {limits.samples}"
            raise Refused(422, reason, param="samples")
        if length > longest:
            reason = f"{length_name} is {length}, more than {longest}"
            raise Refused(422, reason, param=length_name)
        temperature = request.temperature
        if temperature is None:
            temperature = self._config.evaluate.temperature if request.samples > 1 else 0.0
        if 0 < temperature < _COLDEST:
            raise Refused(
                422, f"temperature is {temperature}: it must be 0, or {_COLDEST} and more",
                param="temperature",
            )  # fmt: skip
        seed = new_seed() if request.seed is None else request.seed
        left = self._config.serve.deadline_s - spent()
        return Draw(request.samples, length, temperature, seed, tokens, left)
