"""The two models as Ray Serve deployments.

Each call of a replica joins the batch that its model is at: the generation engine's, or the
endpoint client's own pacing. Nothing here waits for a batch to fill.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from lmcot.actors.base import prepare_process
from lmcot.answering.asking import Asking
from lmcot.answering.presence import Presence, without_address
from lmcot.config import Config
from lmcot.records import Completion, Example, Failure, Paragraph
from lmcot.text.reading import read_answer

Passages = Sequence[tuple[str, str]]
_log = logging.getLogger("lmcot.serve")
_READERS = 2
"""Threads of a replica that split, render and tokenise users' texts, off the event loop."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How rationales are asked of the small LM."""

    samples: int
    max_tokens: int
    temperature: float
    seed: int
    tokens: bool
    """Whether each piece of text is told as it comes."""
    deadline: float
    """Seconds from now."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"{self.samples} samples are asked for")


@dataclass(frozen=True, slots=True)
class Shown:
    """What of the context the models read: told first."""

    paragraphs: tuple[Paragraph, ...]
    prompt_tokens: int
    version: str
    """Of the policy that writes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of one rationale."""

    sample: int
    text: str


@dataclass(frozen=True, slots=True)
class Written:
    """A rationale is done."""

    sample: int
    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants of an answer, besides that it be right."""

    instruction: str = ""
    """What the frozen LM is to observe: a client's system message."""
    max_tokens: int | None = None
    """Of the answer; what is beyond is cut off."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The frozen LM's."""

    text: str = ""
    answer: str = ""
    cut: bool = False
    """Whether the answer may be longer: it ends where the reply, or what was wished for, did."""
    tokens_in: int = 0
    tokens_out: int = 0
    failure: str | None = None
    version: str = ""
    """Which model answered."""


Told = Shown | Piece | Written | Failure


class SmallLM:
    """Writes rationales; all requests of a replica go through the model together."""

    def __init__(
        self, config: Config, source: str, version: str, threads: int | None = None
    ) -> None:
        """Loads the model.

        Args:
            threads: CPU threads of this process; unset: as it has them.
        """
        from lmcot.models.generation.engine import GenerationEngine
        from lmcot.models.generation.shared import SharedEngine
        from lmcot.models.sources import eos_ids, load_model

        if threads is not None:
            prepare_process(threads)
        model, self._tokenizer = load_model(source, config.policy.dtype)
        engine = GenerationEngine(
            model.eval(), pad_id=self._tokenizer.pad_token_id or 0, keep_prefix_tokens=8192
        )
        self._engine = SharedEngine(engine)
        self._eos = eos_ids(model, self._tokenizer)
        self._asking = Asking(config, self._tokenizer)
        self._version = version
        self._readers = ThreadPoolExecutor(_READERS, "lmcot-read")

    def _read(self, question: str, context: Passages) -> tuple[Example, list[int]]:
        """What is shown of the context, and the prompt's tokens; long texts take their time."""
        example = self._asking.example(question, context)
        return example, self._asking.rationale_ids(example)

    def version(self) -> str:
        """Which policy it is."""
        return self._version

    def close(self) -> None:
        """Ends its threads; what is at work is given up."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    async def write(self, question: str, context: Passages, draw: Draw) -> AsyncIterator[Told]:
        """Rationales for a question, told as they are written.

        What it is at is cancelled with it.
        """
        from lmcot.models.generation.requests import (
            FailureEvent,
            SampleEvent,
            SampleRequest,
            TokenEvent,
        )

        loop = asyncio.get_running_loop()
        example, prompt = await loop.run_in_executor(self._readers, self._read, question, context)
        yield Shown(example.context, len(prompt), self._version)
        heard: asyncio.Queue[Any] = asyncio.Queue()
        request = SampleRequest(
            prompt_ids=prompt,
            seeds=self._asking.seeds(draw.seed, draw.samples),
            max_new_tokens=draw.max_tokens,
            temperature=draw.temperature,
            eos_ids=self._eos,
            deadline=time.monotonic() + draw.deadline,
        )

        def hear(event: Any) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, event)

        call = self._engine.listen(request, hear)
        texts = [_Text(self._tokenizer) for _ in range(draw.samples)]
        left = draw.samples
        try:
            while left:
                event = await heard.get()
                if isinstance(event, TokenEvent):
                    if draw.tokens and (more := texts[event.sample].add(event.token_id)):
                        yield Piece(event.sample, more)
                elif isinstance(event, SampleEvent):
                    left -= 1
                    done = event.generated
                    text = self._tokenizer.decode(done.response_ids, skip_special_tokens=True)
                    yield Written(
                        event.sample, text.strip(), len(done.response_ids), done.finish_reason
                    )
                elif isinstance(event, FailureEvent):
                    yield event.failure
                    return
                elif isinstance(event, BaseException):
                    raise RuntimeError("the generation engine failed") from event
        finally:
            if left:
                self._engine.cancel(call)


class _Text:
    """A text that grows by tokens: what of it will not change any more."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = ""

    def add(self, token: int) -> str:
        """What is new, without halves of characters."""
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()
        if text.endswith("\ufffd") or not text.startswith(self._told):
            return ""
        more, self._told = text[len(self._told) :], text
        return more


class FrozenLM:
    """Answers; a local model batches what comes at once, an endpoint's client paces itself."""

    def __init__(self, config: Config, threads: int | None = None) -> None:
        """Loads the model, or makes the endpoint's client."""
        from lmcot.frozen.open import open_frozen_lm
        from lmcot.models.sources import load_tokenizer

        if threads is not None:
            prepare_process(threads)
        if config.frozen is None:
            raise ValueError("the settings have no frozen LM")
        settings = config.frozen.for_service()
        self._settings, self._name = settings, settings.public_name
        self._presence = Presence(settings)
        self._lm = open_frozen_lm(settings, config.prompts)
        self._calls = ThreadPoolExecutor(settings.calls_at_once)
        # What an endpoint's model takes for special is not known here.
        reads = settings.local_source or config.policy.source
        self._asking = Asking(config, load_tokenizer(reads))

    def identity(self) -> str:
        """Names the model for clients."""
        return self._name

    async def there(self) -> bool:
        """Whether it would answer."""
        return await self._presence.there()

    async def answer(
        self,
        question: str,
        paragraphs: Sequence[Paragraph],
        rationale: str | None,
        wish: Wish | None = None,
    ) -> Reply:
        """The answer to a question, guided by a rationale or without one."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._calls, self._answer, question, paragraphs, rationale, wish or Wish()
        )

    async def write_object(
        self,
        question: str,
        paragraphs: Sequence[Paragraph],
        rationale: str,
        answer: str,
        schema: str,
        wish: Wish,
    ) -> Reply:
        """The answer once more, as the JSON object of a schema: as text, however sound it is."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._calls, self._write_object, question, paragraphs, rationale, answer, schema, wish
        )

    def close(self) -> None:
        """Gives up what waits for the model; not to be asked again."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._lm.close()

    def _answer(
        self, question: str, paragraphs: Sequence[Paragraph], rationale: str | None, wish: Wish
    ) -> Reply:
        example = Example("asked", question.strip(), "", tuple(paragraphs))
        prompt = self._asking.answer_prompt(example, rationale, wish.instruction)
        sampling = self._asking.answer_sampling(guided=rationale is not None)
        (found,) = self._lm.generate([prompt], sampling)
        if isinstance(found, Failure):
            return self._failed(found)
        reply = read_reply(found, self._name)
        if wish.max_tokens is None:
            return reply
        short = self._asking.shortened(reply.answer, wish.max_tokens)
        return replace(reply, answer=short, cut=reply.cut or short != reply.answer)

    def _write_object(
        self,
        question: str,
        paragraphs: Sequence[Paragraph],
        rationale: str,
        answer: str,
        schema: str,
        wish: Wish,
    ) -> Reply:
        example = Example("asked", question.strip(), "", tuple(paragraphs))
        prompt = self._asking.object_prompt(example, rationale, answer, schema, wish.instruction)
        (found,) = self._lm.generate([prompt], self._asking.object_sampling(wish.max_tokens))
        if isinstance(found, Failure):
            return self._failed(found)
        cut = found.finish_reason == "length"
        return Reply(
            found.text, cut=cut, tokens_in=found.tokens_in, tokens_out=found.tokens_out,
            version=self._name,
        )  # fmt: skip

    def _failed(self, failure: Failure) -> Reply:
        _log.warning("the frozen LM failed: %s", failure.reason)
        return Reply(failure=without_address(failure.reason, self._settings), version=self._name)


def read_reply(found: Completion, version: str) -> Reply:
    """A completion with the answer that is read out of it."""
    said = read_answer(found)
    if said.silent:
        return Reply(failure=said.silent, version=version)
    return Reply(
        said.text, said.extracted, said.missing == "cut", said.tokens_in, said.tokens_out,
        version=version,
    )  # fmt: skip


def new_seed() -> int:
    """For requests that name none."""
    return random.SystemRandom().getrandbits(62)
