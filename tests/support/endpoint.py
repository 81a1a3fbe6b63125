"""An OpenAI-compatible endpoint on loopback for the tests, down to its sockets: it can be at fault.

It says what it is asked, or what a test's own function makes of a call.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lmcot.config import OpenAIFrozen
from lmcot.frozen.needs import Found, Needs
from lmcot.frozen.openai.backend import OpenAILM
from lmcot.frozen.openai.check import check_endpoint
from lmcot.records import Failure, FailureKind, Message, Prompt, Sampling

FAULTS = ("429", "500", "hang", "closed", "garbage", "empty", "nan", "truncated")
HANG_S = 3.0


@dataclass(frozen=True)
class Call:
    """A request as it came; ``attempt`` counts those of the same body, from 1."""

    path: str
    body: dict[str, Any]
    authorization: str
    attempt: int
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as it is, or the last message of a chat."""
        text = self.body["messages"][-1]["content"] if "messages" in self.body else None
        return self.body["prompt"].removesuffix("\n") if text is None else text


@dataclass(frozen=True)
class Answer:
    """What goes back: after a delay, whole, byte by byte, cut off in the middle, or not at all."""

    body: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    way: Literal["whole", "trickled", "truncated", "closed"] = "whole"


class Endpoint:
    """The server; `respond` may be replaced."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.respond: Callable[[Call], Answer] = as_asked
        self.calls: list[Call] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self._attempts: Counter[str] = Counter()

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The bodies of all calls."""
        return [call.body for call in self.calls]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, which is kept for several calls."""
        try:
            while await self._serve_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = (await reader.readexactly(int(headers["content-length"]))).decode()
        self.times.append(time.monotonic())
        self._attempts[body] += 1
        given = next((one for one in head if one.lower().startswith("authorization")), ": ")
        call = Call(
            head[0].split()[1],
            json.loads(body),
            given.split(": ")[1],
            self._attempts[body],
            headers,
        )
        self.calls.append(call)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await _send(self.respond(call), writer)
        finally:
            self.under_way -= 1


async def _send(answer: Answer, writer: asyncio.StreamWriter) -> bool:
    """Whether the connection is kept."""
    await asyncio.sleep(answer.delay_s)
    if answer.way == "closed":
        return False
    body = answer.body.encode()
    headers = {"content-type": "application/json", **answer.headers, "content-length": len(body)}
    lines = [
        f"HTTP/1.1 {answer.status} X",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    if answer.way == "truncated":
        body = body[: len(body) // 2]
    for part in [bytes([one]) for one in body] if answer.way == "trickled" else [body]:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.05 if answer.way == "trickled" else 0)
    return answer.way == "whole"


@contextmanager
def running() -> Iterator[Endpoint]:
    """An endpoint that serves from a thread of its own."""
    endpoint = Endpoint()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(endpoint.serve, "127.0.0.1", 0))
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield endpoint
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    server.close()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()


def as_asked(call: Call) -> Answer:
    """Says what the user's text tells it to: ``say <text>``, ``<status>``, or the text itself."""
    word, _, rest = call.text.partition(" ")
    if word.isdigit():
        error = {"message": f"status {word} for {call.authorization}"}
        return Answer(json.dumps({"error": error}), int(word), {"retry-after": "0.01"})
    if word == "html":
        return Answer("<html>gateway</html>", headers={"content-type": "text/html"})
    if word in ("broken", "other"):
        return Answer('{"choices": [' if word == "broken" else '{"hello": "world"}')
    text = rest if word == "say" else call.text
    return completion(call, "" if text == "empty" else text)


def completion(
    call: Call, text: str, alternatives: Mapping[str, float] | None = None, **logprobs: Any
) -> Answer:
    """A completion of the API that was called, with the first token's alternatives if wanted."""
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "length" if text.endswith("...") else "stop",
    }
    if "chat" in call.path:
        choice["message"] = {"role": "assistant", "content": text}
        if alternatives and "logprobs" in call.body:
            top = [{"token": token, "logprob": lp} for token, lp in alternatives.items()]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    else:
        choice["text"] = text
        if "logprobs" in call.body:
            choice["logprobs"] = {"top_logprobs": [alternatives or {}], **logprobs}
    written = min(3, call.body["max_tokens"]) if call.body.get("echo") else 3
    usage = {"prompt_tokens": 7, "completion_tokens": written, "total_tokens": 7 + written}
    return Answer(json.dumps({"id": "1", "choices": [choice], "usage": usage}))


def at_fault(fault: str, call: Call, answer: Answer) -> Answer:
    """The answer with one of the `FAULTS`."""
    if fault.isdigit():
        return as_asked(replace(call, body={"messages": [{"content": fault}]}))
    if fault == "hang":
        return replace(answer, delay_s=HANG_S)
    if fault == "closed" or fault == "truncated":
        return replace(answer, way="closed" if fault == "closed" else "truncated")
    if fault == "garbage":
        return replace(answer, body="\x00\x7f{]" + answer.body[:9])
    body = json.loads(answer.body)
    if fault == "nan":
        return replace(answer, body=json.dumps(_without_numbers(body)))
    choice = body["choices"][0]
    choice["logprobs"] = None
    choice |= {"message": {"content": ""}} if "message" in choice else {"text": ""}
    return replace(answer, body=json.dumps(body))


def _without_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_numbers(one) for one in value]
    return math.nan if isinstance(value, float) else value


def settings(endpoint: Endpoint, **changes: Any) -> OpenAIFrozen:
    """Those of an endpoint, without retries."""
    values: dict[str, Any] = {"base_url": endpoint.url, "model": "m", "max_retries": 0}
    return OpenAIFrozen(backend="openai", **(values | changes))


@contextmanager
def client(endpoint: Endpoint, **changes: Any) -> Iterator[OpenAILM]:
    """An `OpenAILM` that is closed at the end."""
    lm = OpenAILM(settings(endpoint, **changes))
    try:
        yield lm
    finally:
        lm.close()


def check(endpoint: Endpoint, needs: Needs | None = None, **changes: Any) -> Found:
    """What a first check of the endpoint finds, by default with one greedy request."""
    greedy = Needs(((ask("Hi")[0], Sampling(max_new_tokens=24)),))
    return check_endpoint(settings(endpoint, **changes), needs or greedy)


def ask(*texts: str) -> list[Prompt]:
    """A prompt of each text."""
    return [(Message("user", text),) for text in texts]


def failure(found: object, kind: FailureKind) -> str:
    """The reason of what must be a failure of a kind."""
    assert isinstance(found, Failure)
    assert found.kind is kind
    assert len(found.reason) <= 300
    assert "\n" not in found.reason
    return found.reason
