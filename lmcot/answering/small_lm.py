"""The small LM: it writes the rationales of all requests together.

Each request joins the batch that the generation engine is at; nothing waits for a batch to fill.
torch is imported where a model is loaded, after the process that loads it was prepared.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmcot.answering.asking import Asking
from lmcot.answering.exchange import Draw, Piece, Shown, Told, Written
from lmcot.config import Config
from lmcot.records import Example, Paragraph

if TYPE_CHECKING:
    from lmcot.models.generation.shared import Engine

_READERS = 2
"""Threads that cut, render and tokenise users' texts, off the event loop."""


class SmallLM:
    """Writes rationales; all requests go through the model together."""

    def __init__(self, config: Config, source: str, version: str) -> None:
        """Loads the model."""
        from lmcot.models.generation.shared import SharedEngine
        from lmcot.models.sources import eos_ids_of, load_tokenizer

        self._engine = SharedEngine(_engine(config, source))
        self._tokenizer = load_tokenizer(source)
        self._eos = eos_ids_of(source, self._tokenizer)
        self._asking = Asking(config, self._tokenizer)
        self._version = version
        self._readers = ThreadPoolExecutor(_READERS, "lmcot-read")

    def _read(
        self, question: str, context: Sequence[Paragraph], first_answer: str
    ) -> tuple[Example, tuple[int, ...]]:
        """The part of the context that fits, and the prompt's tokens."""
        example = replace(self._asking.example(question, context), first_answer=first_answer)
        return example, self._asking.rationale_ids(example)

    def version(self) -> str:
        """The policy that writes."""
        return self._version

    def check_alive(self) -> None:
        """Checks that the model can write.

        Raises:
            RuntimeError: if its engine has ended.
        """
        self._engine.check_alive()

    def close(self) -> None:
        """Ends its threads; requests in flight are dropped."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    async def fit_context(
        self, question: str, context: Sequence[Paragraph]
    ) -> tuple[Paragraph, ...]:
        """The part of the context that the models read."""
        loop = asyncio.get_running_loop()
        read = self._asking.example
        return (await loop.run_in_executor(self._readers, read, question, context)).context

    async def write(
        self, question: str, context: Sequence[Paragraph], draw: Draw, first_answer: str = ""
    ) -> AsyncGenerator[Told, None]:
        """Rationales for a question, told as they are written.

        Closing the iteration cancels the generation.

        Args:
            first_answer: what the frozen LM answered first, where the small LM advises on that.
        """
        from lmcot.models.generation.requests import (
            FailureEvent,
            SampleEvent,
            SampleRequest,
            TokenEvent,
        )

        loop = asyncio.get_running_loop()
        example, prompt = await loop.run_in_executor(
            self._readers, self._read, question, context, first_answer
        )
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


def _engine(config: Config, source: str) -> Engine:
    """The engine that the settings name, with the model loaded."""
    wanted, dtype = config.serve.small.vllm, config.policy.dtype
    if wanted is not None:
        from lmcot.models.generation.vllm_engine import VllmEngine

        return VllmEngine(source, dtype, wanted)
    from lmcot.models.generation.engine import GenerationEngine
    from lmcot.models.sources import load_model

    model, tokenizer = load_model(source, dtype)
    pad = tokenizer.pad_token_id or 0
    return GenerationEngine(model.eval(), pad_id=pad, keep_prefix_tokens=8192)


class _Text:
    """A text that grows by tokens; it tells only what later tokens cannot change."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = ""

    def add(self, token: int) -> str:
        """The new text, without halves of characters."""
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()
        if text.endswith("\ufffd") or not text.startswith(self._told):
            return ""
        more, self._told = text[len(self._told) :], text
        return more
