"""What clients learn of the frozen LM: its name, whether it is there, and no address."""

from __future__ import annotations

import asyncio
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lmcot.answering.presence import Presence, without_address
from lmcot.config import OpenAIFrozen, TransformersFrozen


def endpoint(url: str) -> OpenAIFrozen:
    return OpenAIFrozen(backend="openai", base_url=url, model="smol")


@contextmanager
def answering(status: int, pause: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything so; its address, and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('authorization')}")
            time.sleep(pause)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "there"), [(200, True), (401, True), (404, True), (502, False), (503, False)]
)
def test_any_answer_but_a_gateways_will_do(status: int, there: bool) -> None:
    """No key is sent; asked again at once, the endpoint is not."""
    with answering(status) as (url, asked):
        presence = Presence(endpoint(url))

        async def many() -> list[bool]:
            return list(await asyncio.gather(*(presence.there() for _ in range(20))))

        assert asyncio.run(many()) == [there] * 20
    assert asked == ["/v1/models None"]


def test_an_endpoint_that_went_away_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcot.answering.presence._FRESH_S", {True: 0.0, False: 0.0})
    with answering(200) as (url, _):
        presence = Presence(endpoint(url))
        assert asyncio.run(presence.there())
    assert not asyncio.run(presence.there())


def test_one_that_does_not_answer_is_waited_for_no_longer_than_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lmcot.answering.presence._PROBE_S", 0.2)
    with answering(200, pause=1.5) as (url, _):
        began = time.monotonic()

        async def ask() -> tuple[bool, float]:
            found = await Presence(endpoint(url)).there()
            return found, time.monotonic() - began

        found, seconds = asyncio.run(ask())
    assert not found
    assert seconds < 1.0


def test_a_model_in_the_process_is_there() -> None:
    local = TransformersFrozen(backend="transformers", source="random:llama")
    assert asyncio.run(Presence(local).there())


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("random:llama", "transformers:random:llama"),
        ("org/model", "transformers:org/model"),
        ("/home/ann/secret/model", "transformers:model"),
        ("~/models/mine/", "transformers:mine"),
        ("s3://bucket/folder/model.gguf", "transformers:model.gguf"),
    ],
)
def test_a_local_model_is_named_without_its_folder(source: str, name: str) -> None:
    assert TransformersFrozen(backend="transformers", source=source).public_name == name


@pytest.mark.parametrize(
    "reason",
    [
        "the endpoint at http://lm.internal:8084/v1 does not answer",
        "http://lm.internal:8084/v1/chat/completions: 502",
        "cannot connect to host lm.internal:8084",
        "lm.internal: name not known",
        "see https://lm.internal/help.",
    ],
)
def test_a_failure_is_told_without_the_address(reason: str) -> None:
    settings = endpoint("http://lm.internal:8084/v1")
    assert settings.public_name == "openai:smol"
    told = without_address(reason, settings)
    assert "lm.internal" not in told
    assert "8084" not in told
    assert without_address("the reply holds no text", settings) == "the reply holds no text"
