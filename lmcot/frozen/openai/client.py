"""Asks an OpenAI-compatible endpoint; each request is retried while that may help."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import openai

from lmcot.config import OpenAIFrozen
from lmcot.frozen.openai.access import Access, open_client, request_options
from lmcot.frozen.openai.errors import EndpointError, Faults
from lmcot.frozen.openai.form import RequestForm
from lmcot.frozen.openai.loop import LoopThread
from lmcot.frozen.openai.replies import ErrorBody, Faulty, Garbled, Reply, read
from lmcot.frozen.openai.token_counts import counted, estimate
from lmcot.frozen.pacing import Pace, backoff_s
from lmcot.records import Failure, FailureKind, Usage

_BUSY_STATUS = (429, 503)
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_ALIKE = 3
"""Equal faults in a row for one request, after which it is not retried."""
_PROBE_EVERY_S = 10.0
"""Seconds between the requests that find out whether an endpoint that was down is up again."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class EndpointClient:
    """Asks one endpoint from a thread of its own; any number of threads may wait for it.

    They share the bound of requests in flight, the rate limits, the pauses that the endpoint asks
    for, and the connections.

    Attributes:
        form: how requests are written.
        spend: takes each request that was sent into account, with what it read and wrote. What it
            raises ends the call that asked.

    Raises:
        UserError: if a proxy or certificates cannot be used.
    """

    def __init__(self, settings: OpenAIFrozen, access: Access) -> None:
        self.form = RequestForm.of(settings)
        self.spend: Callable[[Usage], None] = lambda usage: None
        self._settings = settings
        self._faults = Faults(settings, access)
        self._client = open_client(settings, access)
        self._options: Any = request_options(access)
        self._thread = LoopThread(self._client.close)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._requests = _pace(settings.requests_per_minute)
        self._tokens = _pace(settings.tokens_per_minute)
        self._paused_until = 0.0
        self._pause_status = 0
        self._answers = 0
        """Number of requests that were answered so far."""
        self._failing_since: float | None = None
        """Time at which the first request failed since the last answer."""
        self._probe_at = 0.0

    def each(
        self, ask: Callable[[Item], Awaitable[Result | Failure]], items: Sequence[Item]
    ) -> list[Result | Failure]:
        """What asking for each item gives, in order; an `EndpointError` becomes its failure."""
        results: dict[int, Result | Failure] = {}
        todo = iter(enumerate(items))

        async def work() -> None:
            for index, item in todo:
                try:
                    results[index] = await ask(item)
                except EndpointError as error:
                    results[index] = error.failure

        async def everything() -> None:
            # No more than can be in flight: a long call leaves room for others' short ones.
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(items), self._settings.concurrency)):
                    group.create_task(work())

        self._thread.run(everything())
        return [results[index] for index in range(len(items))]

    async def ask(
        self,
        body: dict[str, Any],
        judge: Callable[[Reply], Result],
        *,
        max_retries: int | None = None,
    ) -> Result:
        """What ``judge`` makes of the reply to a request, which is tried again where it may help.

        Raises:
            EndpointError: if the request fails for good.
        """
        retries = self._settings.max_retries if max_retries is None else max_retries
        faults: list[EndpointError] = []
        answers = self._answers
        async with self._slots:
            try:
                async with asyncio.timeout(self._settings.total_timeout_s) as limit:
                    for attempt in itertools.count():
                        self._check_up(faults)
                        await self._turn(estimate(body), limit, faults)
                        try:
                            return await self._attempt(body, judge)
                        except EndpointError as error:
                            self._note(error)
                            faults.append(error)
                            if not error.again or attempt >= retries:
                                raise
                            self._check_hopeless(faults, answers)
                            pause = max(backoff_s(attempt), error.wait_s)
                            await self._rest(pause, limit, faults)
            except TimeoutError:
                reason = f"the request timed out after {self._total()} (last: {_last(faults)})"
                raise self._faults.error(FailureKind.TRANSIENT, reason) from None
        raise AssertionError("unreachable")

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Waits for work that asks."""
        return self._thread.run(work)

    def close(self) -> None:
        """Cancels what is in flight, and closes the connections."""
        self._thread.close()

    def _note(self, error: EndpointError) -> None:
        if error.failure.kind is FailureKind.TRANSIENT and self._failing_since is None:
            self._failing_since = time.monotonic()

    def _check_hopeless(self, faults: Sequence[EndpointError], answers: int) -> None:
        """Fails for good if the same request meets the same fault again and again.

        A reply without text is one at any time; an error of the server is one if it answered
        other requests meanwhile, so that it must be this one that it cannot answer.

        Args:
            answers: requests that had been answered before this one was asked.
        """
        recent = faults[-_ALIKE:]
        error = recent[-1]
        if len(recent) < _ALIKE or len({one.fault() for one in recent}) > 1:
            return
        if error.failure.kind is FailureKind.PERMANENT:
            raise error
        if error.status == 500 and self._answers > answers:
            reason = f"{error.failure.reason} ({_ALIKE} times, while it answered other requests)"
            raise self._faults.error(
                FailureKind.PERMANENT, reason, status=error.status, said=error.said
            )

    def _check_up(self, faults: Sequence[EndpointError]) -> None:
        """Fails at once if nothing was answered for the time that one request may take.

        Else a batch would spend that time on each of its requests, one after the other.
        """
        now = time.monotonic()
        if self._failing_since is None:
            return
        if now - self._failing_since < self._settings.total_timeout_s:
            return
        if now >= self._probe_at:
            self._probe_at = now + _PROBE_EVERY_S
            return
        silent = now - self._failing_since
        reason = f"the endpoint has answered nothing for {silent:.0f} s (last: {_last(faults)})"
        raise self._faults.error(FailureKind.TRANSIENT, reason)

    async def _turn(
        self, tokens: float, limit: asyncio.Timeout, faults: Sequence[EndpointError]
    ) -> None:
        """Waits until the endpoint's pause is over and the rate limits let a request go."""
        while True:
            await self._rest(self._paused_until - time.monotonic(), limit, faults)
            wait = max(
                self._requests.book() if self._requests else 0.0,
                self._tokens.book(tokens) if self._tokens else 0.0,
            )
            # The rate is the user's own wish: no time that the endpoint takes.
            limit.reschedule((limit.when() or 0.0) + wait)
            await asyncio.sleep(wait)
            # A pause may have begun meanwhile; those it held up then go at the rate again.
            if self._paused_until <= time.monotonic():
                return

    async def _rest(
        self, seconds: float, limit: asyncio.Timeout, faults: Sequence[EndpointError]
    ) -> None:
        """Sleeps; at once fails if there is no time for it."""
        if seconds <= 0:
            return
        if asyncio.get_running_loop().time() + seconds > (limit.when() or 0.0):
            status = faults[-1].status if faults else self._pause_status
            asked = self._paused_until - time.monotonic() > 0 or bool(faults and faults[-1].wait_s)
            busy = "is rate limited" if status == 429 else "is busy"
            what = (
                f"the endpoint {busy} and asks to wait {seconds:.0f} s, which"
                if asked
                else f"a pause of {seconds:.0f} s"
            )
            reason = f"{what} would exceed {self._total()} (last: {_last(faults)})"
            raise self._faults.error(FailureKind.TRANSIENT, reason, status=status)
        await asyncio.sleep(seconds)

    async def _attempt(self, body: dict[str, Any], judge: Callable[[Reply], Result]) -> Result:
        api, usage = self._settings.api, Usage(asked=1, sent=1)
        try:
            written = self.form.written(body)
            body_text = await self._client.post(
                _PATHS[api], cast_to=str, body=written, options=self._options
            )
            reply = read(body_text, api)
            self._failing_since = None
            self._answers += 1
            reply = counted(reply, body)
            usage += Usage(tokens=reply.tokens_in + reply.tokens_out, estimated=reply.estimated)
            if self._tokens:
                self._tokens.settle(estimate(body), reply.tokens_in + reply.tokens_out)
            return judge(reply)
        except (openai.OpenAIError, UnicodeEncodeError, ErrorBody, Garbled, Faulty) as error:
            found = self._faults.error_of(error)
            if found.status in _BUSY_STATUS and found.wait_s > 0:
                self._paused_until = max(self._paused_until, time.monotonic() + found.wait_s)
                self._pause_status = found.status
            raise found from None
        finally:
            self.spend(usage)

    def _total(self) -> str:
        return f"frozen.total_timeout_s = {self._settings.total_timeout_s:g}"


def _pace(per_minute: float | None) -> Pace | None:
    return None if per_minute is None else Pace(per_minute)


def _last(faults: Sequence[EndpointError]) -> str:
    return faults[-1].failure.reason if faults else "no answer yet"
