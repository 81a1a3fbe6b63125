"""The OpenAI-compatible backend against a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from lmcot.config import OpenAIFrozen, PromptSettings
from lmcot.errors import UserError
from lmcot.frozen.open import open_frozen_lm
from lmcot.frozen.openai_backend import OpenAILM
from lmcot.records import Choice, Completion, Failure, FailureKind, Message, Prompt, Sampling

YES_NO = ("yes", "no")
GREEDY = Sampling(max_new_tokens=8)


class Endpoint:
    """Says what the user's message tells it to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.reply)
        self.requests: list[dict[str, Any]] = []
        self.authorization = ""
        self.under_way = self.most_under_way = 0
        self.logprobs_refused = False
        self.url = ""

    async def reply(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.authorization = request.headers["authorization"]
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._act(body)
        finally:
            self.under_way -= 1

    async def _act(self, body: dict[str, Any]) -> Response:
        word, _, rest = body["messages"][-1]["content"].partition(" ")
        if word == "hang":
            await asyncio.sleep(1.5)
        if word == "slow":
            await asyncio.sleep(0.1)
        if word == "once":  # fails the first time only
            word = rest if self.asked(body) == 1 else "say"
        if word.isdigit():
            error = {"message": f"status {word} for {self.authorization}"}
            return JSONResponse({"error": error}, int(word), {"retry-after": "0.01"})
        if self.logprobs_refused and "logprobs" in body:
            return JSONResponse({"error": {"message": "no logprobs here"}}, 400)
        if word == "html":
            return Response("<html>gateway</html>", media_type="text/html")
        if word == "broken":
            return Response('{"choices": [', media_type="application/json")
        if word == "other":
            return JSONResponse({"hello": "world"})
        return JSONResponse(_chat_completion(rest if word == "say" else word, body))

    def asked(self, body: dict[str, Any]) -> int:
        return sum(one["messages"] == body["messages"] for one in self.requests)


def _chat_completion(text: str, body: dict[str, Any]) -> dict[str, Any]:
    text = "" if text == "empty" else text
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length" if text.endswith("...") else "stop",
    }
    if text.startswith("Likely") and "logprobs" in body:
        alternatives = {"Yes": 0.5, " yes": 0.1, "No": 0.15, "Y": 0.05, "Maybe": 0.2, "": 0.0}
        entries = [
            {"token": token, "logprob": math.log(p or 1e-9), "bytes": None}
            for token, p in alternatives.items()
        ]
        choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        config = uvicorn.Config(endpoint.app, log_level="error", timeout_graceful_shutdown=1)
        uvicorn_server = uvicorn.Server(config)
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 20
        while not uvicorn_server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield endpoint
        uvicorn_server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def endpoint(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.requests.clear()
    server.most_under_way = 0
    server.logprobs_refused = False
    return server


def _lm(endpoint: Endpoint, **changes: Any) -> OpenAILM:
    values: dict[str, Any] = {
        "base_url": endpoint.url,
        "model": "m",
        "timeout_s": 10.0,
        "max_retries": 0,
    }
    return OpenAILM(OpenAIFrozen(backend="openai", **(values | changes)))


def _ask(*texts: str) -> list[Prompt]:
    return [(Message("user", text),) for text in texts]


def _failure(found: object, kind: FailureKind) -> str:
    assert isinstance(found, Failure)
    assert found.kind is kind
    return found.reason


def test_replies_come_in_order_and_concurrency_is_bounded(endpoint: Endpoint) -> None:
    found = _lm(endpoint, concurrency=3).generate(_ask(*["slow"] * 9), GREEDY)
    assert found == [Completion("slow", 7, 3, "stop")] * 9
    assert 1 < endpoint.most_under_way <= 3
    said = _lm(endpoint).generate(_ask(*(f"say {i}" for i in range(9))), GREEDY)
    assert [one.text for one in said if isinstance(one, Completion)] == list(map(str, range(9)))


def test_the_request_says_all_that_is_asked(endpoint: Endpoint) -> None:
    prompt = (Message("system", "Be brief."), Message("user", "say a\n\nb..."))
    sampling = Sampling(max_new_tokens=5, temperature=0.5, seed=3, stop=("\n\n",))
    found = _lm(endpoint).generate([prompt], sampling)
    # This endpoint does not honour `stop`: the text is cut here.
    assert found == [Completion("a", 7, 3, "stop")]
    assert endpoint.requests == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "say a\n\nb..."},
            ],
            "max_tokens": 5,
            "temperature": 0.5,
            "seed": 3,
            "stop": ["\n\n"],
        }
    ]
    cut = _lm(endpoint).generate(_ask("say too long..."), GREEDY)
    assert cut == [Completion("too long...", 7, 3, "length")]


@pytest.mark.parametrize("status", ["429", "500", "503", "408"])
def test_transient_failures_are_tried_again(endpoint: Endpoint, status: str) -> None:
    prompts = _ask(f"once {status}")
    assert isinstance(_lm(endpoint, max_retries=2).generate(prompts, GREEDY)[0], Completion)
    assert len(endpoint.requests) == 2


def test_a_transient_failure_that_stays_is_returned(endpoint: Endpoint) -> None:
    found = _lm(endpoint, max_retries=2).generate(_ask("429", "say fine"), GREEDY)
    assert "429" in _failure(found[0], FailureKind.TRANSIENT)
    assert isinstance(found[1], Completion)
    assert len(endpoint.requests) == 3 + 1


def test_time_outs_are_transient(endpoint: Endpoint) -> None:
    start = time.monotonic()
    found = _lm(endpoint, timeout_s=0.2).generate(_ask("hang"), GREEDY)
    assert "timed out" in _failure(found[0], FailureKind.TRANSIENT).lower()
    assert time.monotonic() - start < 1.4


def test_lost_connections_are_transient() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        nobody = OpenAIFrozen(backend="openai", base_url=url, model="m", max_retries=0)
        found = OpenAILM(nobody).generate(_ask("say a"), GREEDY)
    _failure(found[0], FailureKind.TRANSIENT)


@pytest.mark.parametrize("status", ["400", "401", "404", "422"])
def test_refusals_are_permanent_and_not_tried_again(endpoint: Endpoint, status: str) -> None:
    found = _lm(endpoint, max_retries=2).generate(_ask(status), GREEDY)
    assert status in _failure(found[0], FailureKind.PERMANENT)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("garbage", ["html", "broken", "other", "empty", "say  "])
def test_garbage_and_empty_replies_are_failures(endpoint: Endpoint, garbage: str) -> None:
    found = _lm(endpoint).generate(_ask(garbage), GREEDY)
    assert "reply" in _failure(found[0], FailureKind.PERMANENT)


def test_choice_from_log_probabilities(endpoint: Endpoint) -> None:
    found = _lm(endpoint).choose(_ask("Likely"), YES_NO)
    # Yes, " yes" and the beginning Y against No; Maybe is neither.
    assert isinstance(found[0], Choice)
    assert found[0].probabilities == pytest.approx({"yes": 0.65 / 0.8, "no": 0.15 / 0.8})
    assert (found[0].tokens_in, found[0].tokens_out) == (7, 3)


@pytest.mark.parametrize(
    ("text", "yes"), [("Yes.", 1), ("**No**, they differ", 0), ("no", 0), ("YES", 1)]
)
def test_choice_from_text(endpoint: Endpoint, text: str, yes: float) -> None:
    found = _lm(endpoint).choose(_ask(f"say {text}"), YES_NO)
    assert isinstance(found[0], Choice)
    assert found[0].probabilities == {"yes": yes, "no": 1 - yes}


@pytest.mark.parametrize("text", ["Maybe", "Nothing", "Yesterday", "empty"])
def test_a_reply_that_is_no_option_is_a_failure(endpoint: Endpoint, text: str) -> None:
    found = _lm(endpoint).choose(_ask(f"say {text}"), YES_NO)
    assert "yes, no" in _failure(found[0], FailureKind.PERMANENT)


def test_an_endpoint_without_log_probabilities_is_asked_without(endpoint: Endpoint) -> None:
    endpoint.logprobs_refused = True
    lm = _lm(endpoint, concurrency=1)
    for found in lm.choose(_ask("say yes", "say yes!"), YES_NO):
        assert isinstance(found, Choice)
    assert ["logprobs" in request for request in endpoint.requests] == [True, False, False]


def test_a_refused_choice_does_not_switch_log_probabilities_off(endpoint: Endpoint) -> None:
    lm = _lm(endpoint, concurrency=1)
    refused, chosen = lm.choose(_ask("400", "Likely"), YES_NO)
    _failure(refused, FailureKind.PERMANENT)
    assert isinstance(chosen, Choice)
    assert "logprobs" in endpoint.requests[-1]


def test_scores_are_not_to_be_had(endpoint: Endpoint) -> None:
    found = _lm(endpoint).score(_ask("a", "b"), ["c", "d"])
    assert len(found) == 2
    assert "no log-likelihoods" in _failure(found[0], FailureKind.PERMANENT)
    assert not endpoint.requests


def test_the_key_comes_from_the_environment_and_is_never_repeated(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-17")
    lm = _lm(endpoint, api_key_env="MY_KEY")
    with caplog.at_level("DEBUG"):
        found = lm.generate(_ask("401"), GREEDY)
    assert endpoint.authorization == "Bearer sk-secret-17"
    # The endpoint's own message holds the key.
    assert "***" in _failure(found[0], FailureKind.PERMANENT)
    for text in (repr(found), repr(lm), lm.identity, caplog.text):
        assert "secret" not in text


def test_an_endpoint_elsewhere_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    elsewhere = OpenAIFrozen(
        backend="openai", base_url="https://api.example.com/v1", model="m", api_key_env="MY_KEY"
    )
    with pytest.raises(UserError, match="MY_KEY is not set"):
        OpenAILM(elsewhere)
    monkeypatch.setenv("MY_KEY", "k")
    assert OpenAILM(elsewhere).identity == "openai:https://api.example.com/v1:m"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", ""])
def test_an_address_must_be_one(url: str) -> None:
    with pytest.raises(UserError, match=r"frozen\.base_url"):
        OpenAILM(OpenAIFrozen(backend="openai", base_url=url, model="m"))


def test_settings_open_the_backend(endpoint: Endpoint) -> None:
    settings = OpenAIFrozen(backend="openai", base_url=endpoint.url, model="m", parameters=7)
    lm = open_frozen_lm(settings, PromptSettings())
    assert isinstance(lm, OpenAILM)
    assert lm.parameters == 7
