"""Asking an OpenAI-compatible endpoint: one request, tried until it is answered or hopeless."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import openai

from lmcot.config import OpenAIFrozen
from lmcot.frozen.openai.access import Access, open_client, request_options
from lmcot.frozen.openai.form import RequestForm
from lmcot.frozen.openai.loop import LoopThread
from lmcot.frozen.openai.replies import ErrorBody, Faulty, Garbled, Reply, read, said
from lmcot.frozen.pacing import Pace, backoff_s, retry_after_s
from lmcot.records import Failure, FailureKind, Usage

_TRANSIENT_STATUS = (408, 409, 425, 429)
# The endpoint does not know the method, or the version of HTTP.
_PERMANENT_STATUS = (501, 505)
_BUSY_STATUS = (429, 503)
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_BYTES_PER_TOKEN = 4
_ALIKE = 3
"""Faults of the same kind in a row for one request, after which another try is no use."""
_PROBE_EVERY_S = 10.0
"""While the endpoint is taken to be down, one request in so many seconds finds out if it is."""
LONGEST_REASON = 300
"""Characters of a failure's reason."""
_LONGEST_BODY = 4000
"""Characters of an endpoint's refusal that are looked at."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class EndpointError(Exception):
    """What went wrong with a request, as its `Failure`.

    Attributes:
        status: of HTTP; 0 if there was no answer.
        again: whether it is worth another try.
        wait_s: what the endpoint asks to wait before, in seconds.
        said: all that the endpoint answered, without secrets.
    """

    def __init__(
        self,
        failure: Failure,
        *,
        status: int = 0,
        again: bool = False,
        wait_s: float = 0.0,
        said: str = "",
    ) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.status = status
        self.again = again
        self.wait_s = wait_s
        self.said = said

    def fault(self) -> tuple[int, str]:
        """What is alike where a request fails in the same way again."""
        return self.status, self.failure.reason


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
        self._access = access
        self._client = open_client(settings, access)
        self._options: Any = request_options(access)
        self._thread = LoopThread(self._client.close)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._requests = _pace(settings.requests_per_minute)
        self._tokens = _pace(settings.tokens_per_minute)
        self._paused_until = 0.0
        self._pause_status = 0
        self._answers = 0
        """Requests that were answered so far."""
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
                        await self._turn(_estimate(body), limit, faults)
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
                raise self._error(FailureKind.TRANSIENT, reason) from None
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
            raise self._error(FailureKind.PERMANENT, reason, status=error.status, said=error.said)

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
        raise self._error(FailureKind.TRANSIENT, reason)

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
            raise self._error(FailureKind.TRANSIENT, reason, status=status)
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
            reply = _counted(reply, body)
            usage += Usage(tokens=reply.tokens_in + reply.tokens_out, estimated=reply.estimated)
            if self._tokens:
                self._tokens.settle(_estimate(body), reply.tokens_in + reply.tokens_out)
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
        except ErrorBody as error:
            again = _may_pass(error.status) or error.status == 200
            kind = FailureKind.TRANSIENT if again else FailureKind.PERMANENT
            told: dict[str, Any] = {"status": error.status, "again": again, "said": str(error)}
            raise self._error(kind, str(error), **told) from None
        except Garbled as error:
            raise self._error(FailureKind.TRANSIENT, str(error), status=200, again=True) from None
        except Faulty as error:
            again = error.again
            raise self._error(FailureKind.PERMANENT, str(error), status=200, again=again) from None
        finally:
            self.spend(usage)

    def _refusal(self, error: openai.APIStatusError) -> EndpointError:
        status = error.status_code
        wait_s = retry_after_s(error.response.headers.get("retry-after"), time.time())
        if status in _BUSY_STATUS and wait_s > 0:
            self._paused_until = max(self._paused_until, time.monotonic() + wait_s)
            self._pause_status = status
        # A quota is not filled up again within the time of a request.
        again = _may_pass(status) and _code(error) != "insufficient_quota"
        reason = f"the endpoint answers with status {status}: {_said(error)}"
        if status in (401, 403):
            reason = f"{self._key_in_words()}: {reason}"
        kind = FailureKind.TRANSIENT if _may_pass(status) else FailureKind.PERMANENT
        told: dict[str, Any] = {"again": again, "wait_s": wait_s, "said": _named_in(error)}
        return self._error(kind, reason, status=status, **told)

    def _key_in_words(self) -> str:
        variable = self._settings.api_key_env
        if self._access.key:
            return f"the key in {variable} is refused"
        if self._access.secrets:
            return "what frozen.headers sends is refused"
        return f"no key was sent, for {variable} is not set"

    def _error(
        self, kind: FailureKind, reason: str, *, said: str = "", **more: Any
    ) -> EndpointError:
        # Some endpoints repeat the key in what they say.
        line = " ".join(self._access.redacted(reason).split())
        said = self._access.redacted(said)
        return EndpointError(Failure(kind, line[:LONGEST_REASON]), said=said, **more)

    def _total(self) -> str:
        return f"frozen.total_timeout_s = {self._settings.total_timeout_s:g}"


def _pace(per_minute: float | None) -> Pace | None:
    return None if per_minute is None else Pace(per_minute)


def _cause(error: openai.OpenAIError) -> str:
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__


def _may_pass(status: int) -> bool:
    """Whether what a status tells may be over at another try."""
    return status in _TRANSIENT_STATUS or (status >= 500 and status not in _PERMANENT_STATUS)


def _last(faults: Sequence[EndpointError]) -> str:
    return faults[-1].failure.reason if faults else "no answer yet"


def _said(error: openai.APIStatusError) -> str:
    return said(error.body or error.message)


def _named_in(error: openai.APIStatusError) -> str:
    """What the refusal is about: a parameter that it points at, else all of its text.

    What it repeats of the request is left out: that names every parameter.
    """
    body = error.body if isinstance(error.body, dict) else {}
    detail = body.get("detail") or body.get("message")
    listed = detail.get("detail") if isinstance(detail, dict) else detail
    if isinstance(listed, list) and all(isinstance(one, dict) for one in listed):
        return "; ".join(
            f"{'.'.join(map(repr, one.get('loc', ())))}: {one.get('type')}: {one.get('msg')}"
            for one in listed
        )[:_LONGEST_BODY]
    if isinstance(body.get("message"), str):
        return f"'{body.get('param')}': {body.get('code')}: {said(body)}"[:_LONGEST_BODY]
    return error.response.text[:_LONGEST_BODY]


def _code(error: openai.APIStatusError) -> Any:
    return error.body.get("code") if isinstance(error.body, dict) else None


def _counted(reply: Reply, body: dict[str, Any]) -> Reply:
    """The reply with its tokens told by length where the endpoint does not count them."""
    tokens_in = reply.tokens_in or _tokens_in(body)
    tokens_out = reply.tokens_out or _length_in_tokens(_new_text(reply, body))
    if (tokens_in, tokens_out) == (reply.tokens_in, reply.tokens_out):
        return reply
    return replace(reply, tokens_in=tokens_in, tokens_out=tokens_out, estimated=True)


def _new_text(reply: Reply, body: dict[str, Any]) -> str:
    if body.get("echo"):
        return reply.text.removeprefix(body["prompt"])
    return reply.thinking + reply.text


def _estimate(body: dict[str, Any]) -> float:
    """Tokens that a request may read and write, told by its length."""
    return float(_tokens_in(body) + body["max_tokens"])


def _tokens_in(body: dict[str, Any]) -> int:
    texts = [body["prompt"]] if "prompt" in body else [one["content"] for one in body["messages"]]
    return sum(map(_length_in_tokens, texts))


def _length_in_tokens(text: str) -> int:
    """By bytes, so that scripts with many bytes a character count as many tokens."""
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)
