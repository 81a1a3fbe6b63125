"""The trained pair in a program or a notebook, without a server."""

from __future__ import annotations

import asyncio
import threading
import uuid
from concurrent.futures import Future
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lmcot.answering.admission import Admission
from lmcot.answering.context import Context
from lmcot.answering.frozen_lm import FrozenLM
from lmcot.answering.guidance import Ask, guide
from lmcot.answering.pair import learned, open_pair
from lmcot.answering.refused import FrozenLMFailed, Refused, UnfitAnswer
from lmcot.answering.schemas import AnswerRequest, AnswerResponse
from lmcot.answering.small_lm import SmallLM
from lmcot.storage import place

if TYPE_CHECKING:
    from lmcot.storage import Place

__all__ = ["FrozenLMFailed", "Guide", "Refused", "UnfitAnswer"]


class Guide:
    """Both models in this process, for any number of threads and event loops at once.

    Close it with `close`, or use it in a ``with`` statement, to end the models' threads.
    """

    def __init__(
        self, run_dir: str | Place, *, policy: str | None = None, threads: int | None = None
    ) -> None:
        """Loads both models.

        Args:
            policy: ``refined``, ``distilled``, ``best`` or ``base``; unset: the most trained one.
            threads: CPU threads that torch computes with in this process; unset: as they are.

        Raises:
            UserError: if that is not a run directory with a trained pair.
        """
        pair = learned(open_pair(place(run_dir), policy))
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self._admission = Admission(pair.config)
        self._small = SmallLM(pair.config, pair.source, pair.version)
        self._frozen = FrozenLM(pair.config)
        # A loop of its own: notebooks and asynchronous programs run in theirs already.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="guide", daemon=True)
        self._thread.start()

    def answer(self, question: str, context: Context = "", **options: Any) -> AnswerResponse:
        """A guided answer; several samples vote.

        Args:
            options: those of `AnswerRequest`: ``samples``, ``max_tokens`` (of a rationale),
                ``temperature`` (unset: greedy for one sample, ``evaluate.temperature`` for
                several), ``seed``, ``unguided`` (whether the frozen LM is also asked without
                guidance), ``answer_schema``.

        Raises:
            Refused: if that makes no sense, is beyond ``serve.limits`` of the settings, or the
                models cannot answer it (`FrozenLMFailed`, `UnfitAnswer`).
        """
        asked = self._begin(self._ask(question, context, options))
        try:
            return asked.result()
        except BaseException:  # Ctrl-C: the models' work is cancelled
            asked.cancel()
            raise

    async def aanswer(self, question: str, context: Context = "", **options: Any) -> AnswerResponse:
        """`answer` for asynchronous programs: the event loop stays free; it can be cancelled."""
        ask = await asyncio.to_thread(self._ask, question, context, options)
        return await asyncio.wrap_future(self._begin(ask))

    def close(self) -> None:
        """Ends the models' threads and drops requests in flight; the guide cannot be used again."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_the_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._small.close()
        self._frozen.close()

    def __enter__(self) -> Guide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, ask: Ask) -> Future[AnswerResponse]:
        if self._loop.is_closed():
            raise RuntimeError("this guide is closed")
        return asyncio.run_coroutine_threadsafe(self._answer(ask), self._loop)

    def _ask(self, question: str, context: Context, options: dict[str, Any]) -> Ask:
        try:
            request = AnswerRequest.model_validate({"question": question, **options})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else None
            reason = first["msg"].removeprefix("Value error, ")
            raise Refused(f"{name or 'the request'}: {reason}", param=name) from None
        if request.stream:
            raise Refused("stream: a program gets the whole answer", param="stream")
        return self._admission.answer(request, uuid.uuid4().hex, context=context)

    async def _answer(self, ask: Ask) -> AnswerResponse:
        found = None
        async with aclosing(guide(ask, self._small, self._frozen)) as told:
            async for one in told:
                found = one
        if not isinstance(found, AnswerResponse):
            raise RuntimeError("guidance ended without an answer")
        return found


async def _cancel_the_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
