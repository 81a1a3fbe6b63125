"""Checks before anything else is done with a request: host, token, body, bound; and the log."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lmcot.config import ServeSettings
from lmcot.serve.access import Access
from lmcot.serve.bodies import BadBody, BodyReader, Receive, replay
from lmcot.serve.errors import INVALID, error_body

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OPEN = (
    "/", "/examples.json", "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs",
    "/docs-files/swagger-ui-bundle.js", "/docs-files/swagger-ui.css", "/docs-files/favicon.png",
)  # fmt: skip
"""Paths that need no token and do not count towards the bound."""
_log = logging.getLogger("lmcot.serve")


class Meters:
    """Prometheus metrics of one ingress replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("path", "status")
        self.requests = Counter(
            "lmcot_requests", "Requests by path and status", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "lmcot_request_seconds", "Seconds of a request", ("path",), registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        )  # fmt: skip
        self.at_work = Gauge("lmcot_at_work", "Requests at work", registry=self.registry)
        self.tokens = Counter(
            "lmcot_tokens", "Tokens read and written", ("model", "way"), registry=self.registry
        )


@dataclass
class Intake:
    """Requests in flight in one ingress replica, and whether it takes more."""

    at_work: int = 0
    ending: bool = False
    """Set at shutdown: new requests get 503, those in flight are answered."""


_began: ContextVar[float] = ContextVar("began")


def spent() -> float:
    """Seconds since the current request began; receiving its body counts."""
    return time.monotonic() - _began.get(time.monotonic())


class Guard:
    """ASGI middleware: refuses bad requests; numbers, counts and logs all of them."""

    def __init__(
        self,
        app: App,
        settings: ServeSettings,
        meters: Meters,
        intake: Intake,
        *,
        digests: Sequence[str] = (),
        tells_id: bool = True,
    ) -> None:
        """Args:
        digests: digests of the accepted tokens; empty: no token is needed.
        tells_id: whether answers get the request's id; False where a proxy adds it.
        """
        self._app = app
        self._settings = settings
        self._meters = meters
        self._intake = intake
        self._access = Access(settings, digests)
        self._bodies = BodyReader(settings.limits)
        self._tells_id = tells_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request; other protocols pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _began.set(time.monotonic())
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        ident = given.decode() if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = ident
        request = _Request(scope, send, ident, self._meters, tells_id=self._tells_id)
        try:
            if not self._access.answers_to(headers.get(b"host")):
                await request.refuse(
                    403, "this service does not answer to that Host: see serve.allowed_hosts"
                )
            elif request.path in _OPEN:
                await self._app(scope, receive, request.send)
            elif not self._access.admits(headers.get(b"authorization", b"")):
                await request.refuse(401, "a bearer token is needed", "authentication_error")
            elif self._intake.ending:
                await request.refuse(503, "the service is shutting down", "overloaded_error")
            else:
                await self._take(headers, scope, receive, request)
        except BadBody as error:
            kind = "overloaded_error" if error.status == 503 else INVALID
            await request.refuse(error.status, str(error), kind)
        finally:
            request.log()

    async def _take(
        self, headers: dict[bytes, bytes], scope: Scope, receive: Receive, request: _Request
    ) -> None:
        """Reads the body, and only then counts the request as in flight."""
        body = await self._bodies.read(headers.get(b"content-length", b""), receive)
        if body is None:
            return
        intake = self._intake
        if intake.at_work >= self._settings.max_requests:
            await request.refuse(
                503, f"too many requests in flight ({intake.at_work})", "overloaded_error"
            )
            return
        self._count(1)
        try:
            await self._app(scope, replay(body, receive), request.send)
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        self._intake.at_work += more
        self._meters.at_work.set(self._intake.at_work)


class _Request:
    """One request: sends its answer, and logs it."""

    def __init__(
        self, scope: Scope, send: Send, ident: str, meters: Meters, *, tells_id: bool
    ) -> None:
        self._tells_id = tells_id
        self._scope = scope
        self.path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        """The path without the service's prefix."""
        self._send = send
        self._id = ident
        self._meters = meters
        self._started = time.monotonic()
        self._status = 499
        """499, that the client went away, until an answer begins."""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Sends a part of the answer; headers get the request's id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            more = [(b"x-content-type-options", b"nosniff")]
            if self._tells_id:
                more.append((b"x-request-id", self._id.encode()))
            message["headers"] = [*message.get("headers", []), *more]
        await self._send(message)

    async def refuse(self, status: int, reason: str, kind: str = INVALID) -> None:
        """Answers with an error."""
        body = json.dumps(error_body(status, reason, kind)).encode()
        headers = [(b"content-type", b"application/json")]
        headers.append((b"content-length", str(len(body)).encode()))
        if status == 503:
            headers.append((b"retry-after", b"1"))
        if status == 408:
            headers.append((b"connection", b"close"))
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def log(self) -> None:
        """One line of JSON, without contents."""
        seconds = time.monotonic() - self._started
        route = self._scope.get("route")
        path = getattr(route, "path", None) or ("other" if self._status == 404 else "refused")
        if self.path in _OPEN:
            path = self.path
        self._meters.requests.labels(path, str(self._status)).inc()
        self._meters.seconds.labels(path).observe(seconds)
        line = {
            "request": self._id, "method": self._scope["method"], "path": path,
            "status": self._status, "seconds": round(seconds, 4),
        }  # fmt: skip
        _log.info(json.dumps(line))
