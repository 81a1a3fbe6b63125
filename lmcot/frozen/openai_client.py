"""Asking an OpenAI-compatible endpoint: one request, tried until it is answered or hopeless."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import openai

from lmcot.config import OpenAIFrozen
from lmcot.frozen.openai_loop import LoopThread
from lmcot.frozen.openai_replies import Faulty, Garbled, Reply, read
from lmcot.frozen.pacing import Pace, backoff_s, retry_after_s
from lmcot.records import Failure, FailureKind

_TRANSIENT_STATUS = (408, 409, 425, 429)
# The endpoint does not know the method, or the version of HTTP.
_PERMANENT_STATUS = (501, 505)
_BUSY_STATUS = (429, 503)
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_CHARACTERS_PER_TOKEN = 4
_PROBE_EVERY_S = 10.0
"""While the endpoint is taken to be down, one request in so many seconds finds out if it is."""
LONGEST_REASON = 300
"""Characters of a failure's reason."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class EndpointError(Exception):
    """What went wrong with a request, as its `Failure`.

    Attributes:
        status: of HTTP; 0 if there was no answer.
        again: whether it is worth another try.
        wait_s: what the endpoint asks to wait before, in seconds.
    """

    def __init__(
        self, failure: Failure, *, status: int = 0, again: bool = False, wait_s: float = 0.0
    ) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.status = status
        self.again = again
        self.wait_s = wait_s


class EndpointClient:
    """Asks one endpoint from a thread of its own; any number of threads may wait for it.

    They share the bound of requests under way, the rate limits, the pauses that the endpoint asks
    for, and the connections.

    Args:
        key: sent to the endpoint, and struck out of all that it says.
    """

    def __init__(self, settings: OpenAIFrozen, key: str) -> None:
        self._settings = settings
        self._key = key
        reply_s = settings.read_timeout_s
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=key,
            timeout=openai.Timeout(
                connect=settings.connect_timeout_s, read=reply_s, write=reply_s, pool=None
            ),
            max_retries=0,
        )
        self._thread = LoopThread(self._client.close)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._requests = _pace(settings.requests_per_minute)
        self._tokens = _pace(settings.tokens_per_minute)
        self._paused_until = 0.0
        self._failing_since: float | None = None
        """When the first request failed since the last answer."""
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
            # No more than can be under way: a long call leaves room for others' short ones.
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
        last = "no answer yet"
        async with self._slots:
            try:
                async with asyncio.timeout(self._settings.total_timeout_s) as limit:
                    for attempt in itertools.count():
                        self._check_up(last)
                        await self._turn(_estimate(body), limit, last)
                        try:
                            return await self._attempt(body, judge)
                        except EndpointError as error:
                            self._note(error)
                            if not error.again or attempt >= retries:
                                raise
                            last = error.failure.reason
                            await self._rest(max(backoff_s(attempt), error.wait_s), limit, last)
            except TimeoutError:
                reason = f"the request timed out after {self._total()} (last: {last})"
                raise self._error(FailureKind.TRANSIENT, reason) from None
        raise AssertionError("unreachable")

    def check(self, body: dict[str, Any], *, max_retries: int) -> None:
        """Asks once, and takes any completion.

        Raises:
            EndpointError: if there is none.
        """
        self._thread.run(self.ask(body, lambda reply: None, max_retries=max_retries))

    def close(self) -> None:
        """Gives up what is under way, and the connections."""
        self._thread.close()

    def _note(self, error: EndpointError) -> None:
        if error.failure.kind is FailureKind.TRANSIENT and self._failing_since is None:
            self._failing_since = time.monotonic()

    def _check_up(self, last: str) -> None:
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
        reason = f"the endpoint has answered nothing for {silent:.0f} s (last: {last})"
        raise self._error(FailureKind.TRANSIENT, reason)

    async def _turn(self, tokens: float, limit: asyncio.Timeout, last: str) -> None:
        """Waits until the endpoint's pause is over and the rate limits let a request go."""
        while True:
            await self._rest(self._paused_until - time.monotonic(), limit, last)
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

    async def _rest(self, seconds: float, limit: asyncio.Timeout, last: str) -> None:
        """Sleeps; at once fails if there is no time for it."""
        if seconds <= 0:
            return
        if asyncio.get_running_loop().time() + seconds > (limit.when() or 0.0):
            reason = f"a pause of {seconds:.0f} s would exceed {self._total()} (last: {last})"
            raise self._error(FailureKind.TRANSIENT, reason)
        await asyncio.sleep(seconds)

    async def _attempt(self, body: dict[str, Any], judge: Callable[[Reply], Result]) -> Result:
        api = self._settings.api
        try:
            reply = read(await self._client.post(_PATHS[api], cast_to=str, body=body), api)
            self._failing_since = None
            used = reply.tokens_in + reply.tokens_out
            if self._tokens and used:
                self._tokens.settle(_estimate(body), used)
            return judge(reply)
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APITimeoutError:
            reason = "the request timed out: the endpoint did not reply in time"
            raise self._error(FailureKind.TRANSIENT, reason, again=True) from None
        except openai.OpenAIError as error:
            reason = f"the connection to the endpoint failed ({_cause(error)})"
            raise self._error(FailureKind.TRANSIENT, reason, again=True) from None
        except UnicodeEncodeError as error:
            reason = f"the prompt cannot be sent as UTF-8 ({error.reason})"
            raise self._error(FailureKind.PERMANENT, reason) from None
        except Garbled as error:
            raise self._error(FailureKind.TRANSIENT, str(error), status=200, again=True) from None
        except Faulty as error:
            raise self._error(FailureKind.PERMANENT, str(error), status=200, again=True) from None

    def _refusal(self, error: openai.APIStatusError) -> EndpointError:
        status = error.status_code
        wait_s = retry_after_s(error.response.headers.get("retry-after"), time.time())
        if status in _BUSY_STATUS:
            self._paused_until = max(self._paused_until, time.monotonic() + wait_s)
        again = status in _TRANSIENT_STATUS or (status >= 500 and status not in _PERMANENT_STATUS)
        reason = f"the endpoint answers with status {status}: {_said(error)}"
        if status in (401, 403):
            reason = f"the key in {self._settings.api_key_env} is refused: {reason}"
        kind = FailureKind.TRANSIENT if again else FailureKind.PERMANENT
        return self._error(kind, reason, status=status, again=again, wait_s=wait_s)

    def _error(self, kind: FailureKind, reason: str, **more: Any) -> EndpointError:
        # Some endpoints repeat the key in what they say.
        line = " ".join(reason.replace(self._key, "***").split())
        return EndpointError(Failure(kind, line[:LONGEST_REASON]), **more)

    def _total(self) -> str:
        return f"frozen.total_timeout_s = {self._settings.total_timeout_s:g}"


def _pace(per_minute: float | None) -> Pace | None:
    return None if per_minute is None else Pace(per_minute)


def _cause(error: openai.OpenAIError) -> str:
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__


def _said(error: openai.APIStatusError) -> str:
    body = error.body
    return str((body.get("message") if isinstance(body, dict) else None) or body or error.message)


def _estimate(body: dict[str, Any]) -> float:
    """Tokens that a request may read and write, told by its length."""
    texts = [body["prompt"]] if "prompt" in body else [one["content"] for one in body["messages"]]
    return sum(map(len, texts)) / _CHARACTERS_PER_TOKEN + body["max_tokens"]
