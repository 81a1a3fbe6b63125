"""What every request passes before anything else: size, form, tokens, the bound; and the log."""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lmcot.config import ServeSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OPEN = ("/", "/examples.json", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json")
"""Paths that need no token and are not counted against the bound."""
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


class Guard:
    """ASGI middleware: refuses what it must, numbers, counts and logs the rest."""

    def __init__(self, app: App, settings: ServeSettings, meters: Meters) -> None:
        self._app = app
        self._settings = settings
        self._meters = meters
        tokens = os.environ.get(settings.tokens_env, "").split(",")
        self._tokens = [one.strip().encode() for one in tokens if one.strip()]
        self._at_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what is not HTTP goes by."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        ident = given.decode() if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = ident
        request = _Request(scope, send, ident, self._meters)
        path = scope["path"]
        try:
            if path in _OPEN:
                await self._app(scope, receive, request.send)
                return
            if not self._may(headers.get(b"authorization", b"")):
                await request.refuse(401, "a bearer token is needed", "authentication_error")
                return
            if self._at_work >= self._settings.max_requests:
                await request.refuse(
                    503, f"{self._at_work} requests are at work already", "overloaded_error"
                )
                return
            self._at_work += 1
            self._meters.at_work.set(self._at_work)
            try:
                body = await self._body(headers, receive, request)
                if body is not None:
                    await self._app(scope, _replay(body, receive), request.send)
            finally:
                self._at_work -= 1
                self._meters.at_work.set(self._at_work)
        finally:
            request.log()

    def _may(self, authorization: bytes) -> bool:
        if not self._tokens:
            return True
        scheme, _, token = authorization.partition(b" ")
        found = [hmac.compare_digest(one, token.strip()) for one in self._tokens]
        return scheme.lower() == b"bearer" and any(found)

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive, request: _Request
    ) -> bytes | None:
        """The whole body; None if it was refused, or the client went away."""
        limits = self._settings.limits
        told = headers.get(b"content-length", b"0")
        too_long = f"the body is longer than {limits.body_bytes} bytes"
        if told.isdigit() and int(told) > limits.body_bytes:
            await request.refuse(413, too_long)
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limits.body_bytes:
                await request.refuse(413, too_long)
                return None
            if not message.get("more_body", False):
                break
        if _depth(body, limits.json_depth) > limits.json_depth:
            await request.refuse(
                422, f"the JSON is nested more than {limits.json_depth} levels deep"
            )
            return None
        return bytes(body)


class _Request:
    """What is known of a request for its answer and the log."""

    def __init__(self, scope: Scope, send: Send, ident: str, meters: Meters) -> None:
        self._scope = scope
        self._send = send
        self._id = ident
        self._meters = meters
        self._started = time.monotonic()
        self._status = 499
        """Until an answer begins: the client went away."""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Passes the answer on, with the request's id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self._id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        await self._send(message)

    async def refuse(self, status: int, reason: str, kind: str = "invalid_request_error") -> None:
        """Answers with an error."""
        body = json.dumps(error_body(status, reason, kind)).encode()
        headers = [(b"content-type", b"application/json")]
        headers.append((b"content-length", str(len(body)).encode()))
        if status == 503:
            headers.append((b"retry-after", b"1"))
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def log(self) -> None:
        """One line of JSON, without contents."""
        seconds = time.monotonic() - self._started
        route = self._scope.get("route")
        path = getattr(route, "path", None) or ("other" if self._status == 404 else "refused")
        if self._scope["path"] in _OPEN:
            path = self._scope["path"]
        self._meters.requests.labels(path, str(self._status)).inc()
        self._meters.seconds.labels(path).observe(seconds)
        line = {
            "request": self._id, "method": self._scope["method"], "path": path,
            "status": self._status, "seconds": round(seconds, 4),
        }  # fmt: skip
        _log.info(json.dumps(line))


def error_body(
    status: int, message: str, kind: str = "invalid_request_error", param: str | None = None
) -> dict[str, Any]:
    """The shape of every error; OpenAI's clients read it too."""
    return {"error": {"message": message, "type": kind, "code": status, "param": param}}


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then whatever comes: the client's leaving."""
    told = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def _depth(body: bytes | bytearray, enough: int) -> int:
    """How deep brackets are nested outside of strings; stops counting at what is too deep."""
    depth = deepest = 0
    for mark in _MARKS.finditer(body):
        character = mark[0][:1]
        if character in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > enough:
                break
        elif character in b"]}":
            depth -= 1
    return deepest
