"""An ASGI application, called without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answered:
    """What it answered."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole body."""
        return b"".join(self.chunks).decode()

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.text)


async def call(
    app: Any,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    parts: Iterable[bytes] | None = None,
    leaves_after: int | None = None,
    method: str = "",
    prefix: str = "",
    stalls_s: float = 0.0,
) -> Answered:
    """One request: POST where there is a body, else GET.

    Args:
        body: sent as JSON; bytes as they are.
        parts: the body in parts, without its length.
        leaves_after: the client goes away after so many chunks of the answer.
        method: instead of those.
        prefix: of the path, which the application is reached under.
        stalls_s: the body's second half comes so much later.
    """
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    pieces = list(parts) if parts is not None else [data]
    if stalls_s:
        pieces = [data[: len(data) // 2], data[len(data) // 2 :]]
    given = {"content-type": "application/json", **(headers or {})}
    if parts is None:
        given["content-length"] = str(len(data))
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1",
        "method": method or ("GET" if body is None and parts is None else "POST"),
        "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http",
        "headers": [(k.lower().encode(), v.encode()) for k, v in given.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "root_path": prefix,
    }  # fmt: skip
    answered, left, gone = Answered(), list(pieces), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if left:
            if stalls_s and len(left) == 1:
                await asyncio.sleep(stalls_s)
            part = left.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(left)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answered.status = message["status"]
            answered.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        elif message.get("body"):
            answered.chunks.append(message["body"])
            if leaves_after is not None and len(answered.chunks) >= leaves_after:
                gone.set()

    await app(scope, receive, send)
    return answered
