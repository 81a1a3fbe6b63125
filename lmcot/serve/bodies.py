"""Reads requests' bodies, bounded in size, time, nesting and number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lmcot.config import Limits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_GRACE_S = 1.0
"""A body that has been awaited for less than this is not dropped for another one."""
_OFF_LOOP_BYTES = 2**14
"""Longer bodies are checked in a thread."""
_JSON_DEPTH = 16
"""Levels that a body's JSON may be nested."""


class BadBody(Exception):
    """A refused body, with the HTTP status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BodyReader:
    """Reads the bodies of one ingress replica's requests.

    Where too many are awaited, the one that has taken the longest is dropped: slow clients cannot
    keep out a client that sends its body at once.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waited: dict[asyncio.Timeout, float] = {}
        """Bodies that are awaited, with the times of their beginnings, oldest first."""

    async def read(self, declared: bytes, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away.

        Args:
            declared: the header Content-Length.

        Raises:
            BadBody: if it is too long, too slow, or too deeply nested.
        """
        limits = self._limits
        if declared.isdigit() and int(declared[:20]) > limits.body_bytes:
            raise BadBody(413, self._too_long)
        self._make_room()
        try:
            async with asyncio.timeout(limits.body_s) as clock:
                self._waited[clock] = time.monotonic()
                try:
                    body = await self._receive(receive)
                finally:
                    self._waited.pop(clock, None)
        except TimeoutError:
            raise BadBody(
                408, f"the request's body did not arrive within {limits.body_s:g} s"
            ) from None
        if body is None:
            return None
        if len(body) > _OFF_LOOP_BYTES:
            fault = await asyncio.to_thread(fault_of, body, limits)
        else:
            fault = fault_of(body, limits)
        if fault:
            raise BadBody(422, fault)
        return body

    @property
    def _too_long(self) -> str:
        return f"the body is longer than {self._limits.body_bytes} bytes"

    def _make_room(self) -> None:
        if len(self._waited) < self._limits.readers:
            return
        oldest, since = next(iter(self._waited.items()))
        if time.monotonic() - since < _GRACE_S:
            raise BadBody(503, f"{len(self._waited)} requests' bodies are being received already")
        del self._waited[oldest]
        oldest.reschedule(asyncio.get_running_loop().time())

    async def _receive(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise BadBody(413, self._too_long)
            if not message.get("more_body", False):
                return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then later messages, such as the client's leaving."""
    told = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


_STRUCTURE = b"[]{},"
_OTHER = bytes(one for one in range(256) if one not in _STRUCTURE)


def fault_of(body: bytes, limits: Limits) -> str:
    """Why a JSON body is too large to parse, by its marks outside of strings; empty if it is not.

    A parser would spend memory on each value, and a validator a message on each wrong one.
    """
    depth = deepest = values = 0
    for mark in _outside_strings(body).translate(None, _OTHER):
        if mark in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > _JSON_DEPTH:
                return f"the JSON is nested more than {_JSON_DEPTH} levels deep"
        elif mark in b"]}":
            depth -= 1
        values += mark in b"[{,"
        if values > limits.json_values:
            return f"the JSON holds more than {limits.json_values} values"
    return ""


def _outside_strings(body: bytes) -> bytes:
    """The body without the contents of its strings."""
    outside, inside = [], False
    for part in body.split(b'"'):
        if not inside:
            outside.append(part)
            inside = True
        else:
            # A quote behind an odd number of backslashes belongs to the string.
            inside = (len(part) - len(part.rstrip(b"\\"))) % 2 == 1
    return b"".join(outside)
