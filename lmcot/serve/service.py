"""What the routes of the HTTP API do, with any pair of models."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from lmcot.answering.admission import Admission
from lmcot.answering.exchange import Answerer, Piece, Shown, Writer, Written
from lmcot.answering.guidance import Ask, answer_first, guide
from lmcot.answering.refused import Refused
from lmcot.answering.schemas import AnswerRequest, AnswerResponse, Versions
from lmcot.config import Config, ServeSettings
from lmcot.records import Failure
from lmcot.serve.chat import ChatAdmission
from lmcot.serve.errors import Rejected
from lmcot.serve.guard import Intake, Meters, spent
from lmcot.serve.schemas import Rationale, RationaleRequest, RationaleResponse

_log = logging.getLogger("lmcot.serve")
_Item = TypeVar("_Item")
Ready = Callable[[], Awaitable[Versions]]
"""Returns the versions of both models, or raises `NotReady`."""


class NotReady(Exception):
    """A model cannot be reached."""


class Service:
    """What the routes do, with any pair of models."""

    def __init__(self, config: Config, small: Writer, frozen: Answerer, ready: Ready) -> None:
        self.settings: ServeSettings = config.serve
        self.meters = Meters()
        self.intake = Intake()
        self.ready = ready
        self.admission = Admission(config)
        self.chats = ChatAdmission(config, self.admission)
        self._small = small
        self._frozen = frozen

    async def events(self, ask: Ask) -> AsyncGenerator[Piece | Written | AnswerResponse, None]:
        """Pieces, rationales and the answer of a request, within its deadline.

        Raises:
            Refused: if the models cannot answer it.
            Rejected: with 504 past the deadline; the models' work is cancelled.
        """
        told = guide(ask, self._small, self._frozen)
        async with aclosing(self._timed(told, ask.draw.deadline)) as timed:
            async for one in timed:
                if isinstance(one, AnswerResponse):
                    self._count(one)
                yield one

    def _count(self, found: AnswerResponse) -> None:
        for way, number in found.tokens.model_dump().items():
            model, _, direction = way.rpartition("_lm_")
            self.meters.tokens.labels(model, direction).inc(number)

    async def answer(self, ask: Ask) -> AnswerResponse:
        """The answer to a request, once all of it is there."""
        found: AnswerResponse | None = None
        async with aclosing(self.events(ask)) as events:
            async for one in events:
                if isinstance(one, AnswerResponse):
                    found = one
        if found is None:
            raise RuntimeError("a request ended without an answer")
        if self.settings.log_contents:
            _log.info(json.dumps({"request": ask.id, "question": ask.question,
                                  "answer": found.answer}))  # fmt: skip
        return found

    async def admit(self, request: AnswerRequest, ident: str, *, tokens: bool = False) -> Ask:
        """Checks a request for an answer, off the event loop: long contexts take their time."""
        return await asyncio.to_thread(
            self.admission.answer,
            request,
            ident,
            context=request.context,
            tokens=tokens,
            spent=spent(),
        )

    async def rationale(self, request: RationaleRequest, ident: str) -> RationaleResponse:
        """Guidance alone."""
        context = await asyncio.to_thread(self.admission.context, request.question, request.context)
        draw = self.admission.draw(request, spent=spent())
        first = ""
        if self.admission.advises:
            asked = answer_first(request.question, context, self._small, self._frozen)
            context, reply = await self._within(asked, draw.deadline)
            first = reply.answer.text.strip()
        told = self._small.write(request.question, context, draw, first)
        shown, written = Shown((), 0, ""), []
        async with aclosing(self._timed(told, draw.deadline)) as timed:
            async for one in timed:
                if isinstance(one, Failure):
                    raise Refused(f"the small LM cannot read this: {one.reason}")
                if isinstance(one, Shown):
                    shown = one
                elif isinstance(one, Written):
                    written.append(one)
        rationales = [
            Rationale(
                text=one.text,
                concluded=self.admission.task.stated(one.text, request.question),
                tokens=one.tokens,
                finish_reason=one.finish_reason,
            )
            for one in sorted(written, key=lambda one: one.sample)
        ]  # fmt: skip
        return RationaleResponse(
            id=ident,
            rationales=rationales,
            prompt_tokens=shown.prompt_tokens,
            version=shown.version,
        )

    async def _timed(
        self, told: AsyncGenerator[_Item, None], seconds: float
    ) -> AsyncGenerator[_Item, None]:
        end = time.monotonic() + seconds
        async with aclosing(told):
            while True:
                try:
                    one = await self._within(anext(told), end - time.monotonic())
                except StopAsyncIteration:
                    return
                yield one

    async def _within(self, waited: Awaitable[_Item], seconds: float) -> _Item:
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                return await waited
        except TimeoutError:
            limit = self.settings.deadline_s
            raise Rejected(
                504, f"the request took longer than {limit:g} s", "timeout_error"
            ) from None
