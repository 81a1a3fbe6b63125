"""The OpenAI-compatible backend on a chat endpoint that is in order."""

from __future__ import annotations

import json
import math
import threading
import time
from typing import Any

import pytest

from lmcot.config import OpenAIFrozen, PromptSettings
from lmcot.errors import UserError
from lmcot.frozen.open import open_frozen_lm
from lmcot.frozen.openai.backend import OpenAILM
from lmcot.records import Choice, Completion, FailureKind, Message, Sampling
from lmcot.text.visible import NOT_SHOWN
from tests.support.endpoint import (
    HANG_S,
    Answer,
    Call,
    Endpoint,
    as_asked,
    ask,
    check,
    client,
    completion,
    failure,
    settings,
)

YES_NO = ("yes", "no")
GREEDY = Sampling(max_new_tokens=8)


def _slowly(call: Call) -> Answer:
    return Answer(as_asked(call).body, delay_s=0.1)


def _wait_for_a_call(endpoint: Endpoint) -> None:
    deadline = time.monotonic() + 10
    while not endpoint.calls and time.monotonic() < deadline:
        time.sleep(0.01)


def _likely(call: Call) -> Answer:
    shares = {"Yes": 0.5, " yes": 0.1, "No": 0.15, "Y": 0.05, "Maybe": 0.2, "": 1e-9}
    return completion(call, call.text, {token: math.log(p) for token, p in shares.items()})


def _without_logprobs(call: Call) -> Answer:
    if "logprobs" in call.body:
        return Answer('{"error": {"message": "no logprobs here"}}', 400)
    return as_asked(call)


def test_replies_come_in_order_and_concurrency_is_bounded(endpoint: Endpoint) -> None:
    endpoint.respond = _slowly
    with client(endpoint, concurrency=3) as lm:
        assert lm.generate(ask(*["slow"] * 9), GREEDY) == [Completion("slow", 7, 3, "stop")] * 9
        assert 1 < endpoint.most_under_way <= 3
        said = lm.generate(ask(*(f"say {i}" for i in range(9))), GREEDY)
        assert [one.text for one in said if isinstance(one, Completion)] == list(map(str, range(9)))
        assert lm.generate([], GREEDY) == []


def test_threads_share_one_bound(endpoint: Endpoint) -> None:
    endpoint.respond = _slowly
    found = {}
    with client(endpoint, concurrency=4) as lm:

        def call(name: str) -> None:
            found[name] = lm.generate(ask(*[f"say {name}"] * 6), GREEDY)

        threads = [threading.Thread(target=call, args=[name]) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == {name: [Completion(name, 7, 3, "stop")] * 6 for name in "abcd"}
    assert endpoint.most_under_way == 4


def test_a_short_call_does_not_wait_for_the_whole_of_a_long_one(endpoint: Endpoint) -> None:
    endpoint.respond = _slowly
    with client(endpoint, concurrency=2) as lm:
        long = threading.Thread(target=lm.generate, args=[ask(*["say long"] * 40), GREEDY])
        long.start()
        _wait_for_a_call(endpoint)
        lm.generate(ask("say short"), GREEDY)
        assert len(endpoint.calls) < 30
        long.join(20)


def test_closing_breaks_off_what_is_under_way(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: Answer("", delay_s=HANG_S)
    ended = threading.Event()
    with client(endpoint) as lm:

        def call() -> None:
            try:
                lm.generate(ask("say a"), GREEDY)
            except BaseException:
                ended.set()

        waiting = threading.Thread(target=call)
        waiting.start()
        _wait_for_a_call(endpoint)
    assert ended.wait(HANG_S - 1)
    waiting.join(5)
    lm.close()  # again
    with pytest.raises(RuntimeError, match="closed"):
        lm.generate(ask("say a"), GREEDY)


def test_the_request_says_all_that_is_asked(endpoint: Endpoint) -> None:
    prompt = (Message("system", "Be brief."), Message("user", "say a\n\nb..."))
    sampling = Sampling(max_new_tokens=5, temperature=0.5, seed=3, stop=("\n\n",))
    with client(endpoint) as lm:
        # This endpoint does not honour `stop`: the text is cut here.
        assert lm.generate([prompt], sampling) == [Completion("a", 7, 3, "stop")]
        cut = lm.generate(ask("say too long..."), GREEDY)
    assert cut == [Completion("too long...", 7, 3, "length")]
    assert endpoint.calls[0].path == "/v1/chat/completions"
    assert endpoint.requests[0] == {
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


def test_a_prompt_that_is_no_text_fails_by_itself(endpoint: Endpoint) -> None:
    with client(endpoint) as lm:
        found = lm.generate(ask("half a character: \ud83d", "say a"), GREEDY)
    assert "UTF-8" in failure(found[0], FailureKind.PERMANENT)
    assert isinstance(found[1], Completion)


def test_blank_lines_before_the_reply_are_no_stop(endpoint: Endpoint) -> None:
    with client(endpoint, max_retries=2) as lm:
        found = lm.generate(ask("say \n\nb"), Sampling(max_new_tokens=5, stop=("\n\n",)))
    assert found == [Completion("b", 7, 3, "stop")]


def test_a_stop_that_the_endpoint_applied_within_thinking_is_left_to_us(endpoint: Endpoint) -> None:
    whole = "<think>\n\nHm.\n\n</think>\n\nVelm\n\nSo much for that."

    def stops(call: Call) -> Answer:
        text = whole.split("\n\n")[0] if "stop" in call.body else whole
        return completion(call, text)

    endpoint.respond = stops
    with client(endpoint) as lm:
        found = lm.generate(ask("a"), Sampling(max_new_tokens=5, stop=("\n\n",)))
    assert found == [Completion("Velm", 7, 3, "stop", thinking="Hm.")]
    assert [request.get("stop") for request in endpoint.requests] == [["\n\n"], None]


@pytest.mark.parametrize(("api", "sent"), [("chat", None), ("completions", ["\n\n"])])
def test_only_models_that_read_plain_text_stop_at_a_blank_line_by_default(
    endpoint: Endpoint, api: str, sent: list[str] | None
) -> None:
    endpoint.respond = lambda call: completion(call, "One.\n\nTwo.")
    with client(endpoint, api=api) as lm:
        (found,) = lm.generate(ask("a"), Sampling(max_new_tokens=5, stop=None))
    assert isinstance(found, Completion)
    assert found.text == ("One." if sent else "One.\n\nTwo.")
    assert [request.get("stop") for request in endpoint.requests] == [sent]


@pytest.mark.parametrize(("content", "thinking"), [(None, NOT_SHOWN), ("", NOT_SHOWN), ("\n", "")])
def test_what_took_all_tokens_and_left_no_text_is_thinking_that_is_not_shown(
    endpoint: Endpoint, content: str | None, thinking: str
) -> None:
    choice = {"message": {"content": content}, "finish_reason": "length"}
    endpoint.respond = lambda call: Answer(json.dumps({"choices": [choice]}))
    with client(endpoint) as lm:
        (found,) = lm.generate(ask("a"), Sampling(max_new_tokens=5))
    assert isinstance(found, Completion)
    assert (found.text, found.thinking, found.finish_reason) == ("", thinking, "length")


@pytest.mark.parametrize(
    ("api", "choice", "tokens", "thinking"),
    [
        ("chat", {"message": {"content": ""}}, 0, ""),
        ("chat", {"message": {"content": ""}}, 5, NOT_SHOWN),
        ("completions", {"text": ""}, None, ""),
    ],
)
def test_special_tokens_alone_are_no_thinking(
    endpoint: Endpoint, api: str, choice: dict[str, Any], tokens: int | None, thinking: str
) -> None:
    """Where the endpoint counts thinking apart, or shows all that the model wrote."""
    usage = {"completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": tokens}}
    body = {"choices": [choice | {"finish_reason": "length"}], "usage": usage}
    endpoint.respond = lambda call: Answer(json.dumps(body))
    with client(endpoint, api=api) as lm:
        (found,) = lm.generate(ask("a"), Sampling(max_new_tokens=5))
    assert isinstance(found, Completion)
    assert (found.text, found.thinking, found.finish_reason) == ("", thinking, "length")


@pytest.mark.parametrize(
    ("message", "text", "thinking"),
    [
        ({"content": "Velm", "reasoning_content": "Hm."}, "Velm", "Hm."),
        ({"content": None, "reasoning": "Hm. So"}, "", "Hm. So"),
        ({"content": "", "reasoning_content": "Hm. So"}, "", "Hm. So"),
        ({"content": "Velm", "thinking": "Hm."}, "Velm", "Hm."),
        ({"content": [{"type": "text", "text": "Velm"}]}, "Velm", ""),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                    {"type": "text", "text": "Ve"},
                    {"type": "text", "text": "lm"},
                ]
            },
            "Velm",
            "Hm.",
        ),
    ],
)
def test_thinking_that_comes_apart_from_the_text(
    endpoint: Endpoint, message: dict[str, Any], text: str, thinking: str
) -> None:
    choice = {"message": message, "finish_reason": "length"}
    endpoint.respond = lambda call: Answer(json.dumps({"choices": [choice]}))
    with client(endpoint) as lm:
        found = lm.generate(ask("a"), Sampling(max_new_tokens=5))
    # Without counts, four bytes are taken for a token.
    tokens = math.ceil(len(thinking + text) / 4)
    assert found == [Completion(text, 1, tokens, "length", thinking, estimated=True)]
    assert len(endpoint.calls) == 1


def test_choice_from_log_probabilities(endpoint: Endpoint) -> None:
    endpoint.respond = _likely
    with client(endpoint) as lm:
        found = lm.choose(ask("Likely"), YES_NO)
    # Yes, " yes" and the beginning Y against No; Maybe is neither.
    assert isinstance(found[0], Choice)
    assert found[0].probabilities == pytest.approx({"yes": 0.65 / 0.8, "no": 0.15 / 0.8})
    assert (found[0].tokens_in, found[0].tokens_out) == (7, 3)


def test_choice_from_text(endpoint: Endpoint) -> None:
    texts = {"Yes.": 1, "**No**, they differ": 0, "no": 0, "YES": 1}
    with client(endpoint) as lm:
        found = lm.choose(ask(*(f"say {text}" for text in texts)), YES_NO)
    for one, yes in zip(found, texts.values(), strict=True):
        assert isinstance(one, Choice)
        assert one.probabilities == {"yes": yes, "no": 1 - yes}


def test_a_reply_that_is_no_option_is_a_failure(endpoint: Endpoint) -> None:
    with client(endpoint) as lm:
        found = lm.choose(ask("say Maybe", "say Nothing", "say Yesterday", "empty"), YES_NO)
    for one in found:
        assert "yes, no" in failure(one, FailureKind.PERMANENT)


def test_an_endpoint_without_log_probabilities_is_asked_without(endpoint: Endpoint) -> None:
    endpoint.respond = _without_logprobs
    with client(endpoint, concurrency=1) as lm:
        for found in lm.choose(ask("say yes", "say yes!"), YES_NO):
            assert isinstance(found, Choice)
    asked = [request.get("top_logprobs") for request in endpoint.requests]
    assert asked == [20, 5, None, None]


def test_a_refused_choice_does_not_switch_log_probabilities_off(endpoint: Endpoint) -> None:
    with client(endpoint, concurrency=1) as lm:
        refused, chosen = lm.choose(ask("400", "say yes"), YES_NO)
    failure(refused, FailureKind.PERMANENT)
    assert isinstance(chosen, Choice)
    assert "logprobs" in endpoint.requests[-1]


def test_chat_endpoints_give_no_scores(endpoint: Endpoint) -> None:
    with client(endpoint) as lm:
        found = lm.score(ask("a", "b"), ["c", "d"])
    assert len(found) == 2
    assert "no log-likelihoods" in failure(found[0], FailureKind.PERMANENT)
    assert not endpoint.requests


def test_the_key_comes_from_the_environment_and_is_never_repeated(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-17\n")
    with client(endpoint, api_key_env="MY_KEY") as lm, caplog.at_level("DEBUG"):
        found = lm.generate(ask("401", "500", "say a"), GREEDY)
        endpoint.respond = lambda call: Answer(f'{{"error": "{call.authorization}"}}', 403)
        with pytest.raises(UserError) as complaint:
            check(endpoint, api_key_env="MY_KEY")
    assert endpoint.calls[0].authorization == "Bearer sk-secret-17"
    # The endpoint's own message holds the key.
    reason = failure(found[0], FailureKind.PERMANENT)
    assert "***" in reason
    assert "MY_KEY is refused" in reason
    assert "***" in str(complaint.value)
    assert caplog.text
    for text in (repr(found), repr(lm), lm.identity, str(complaint.value), caplog.text):
        assert "secret" not in text


def test_an_endpoint_elsewhere_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    elsewhere = OpenAIFrozen(
        backend="openai", base_url="https://api.example.com/v1", model="m", api_key_env="MY_KEY"
    )
    with pytest.raises(UserError, match="MY_KEY is not set"):
        OpenAILM(elsewhere)
    monkeypatch.setenv("MY_KEY", "kéy")
    with pytest.raises(UserError, match="MY_KEY holds no API key"):
        OpenAILM(elsewhere)
    monkeypatch.setenv("MY_KEY", "k")
    assert OpenAILM(elsewhere).identity == "openai:https://api.example.com/v1:m"
    plain = elsewhere.model_copy(update={"api": "completions"})
    assert OpenAILM(plain).identity == "openai:https://api.example.com/v1:m:completions"


def test_settings_open_the_backend(endpoint: Endpoint) -> None:
    given = settings(endpoint, parameters=7, cache={"enabled": False})
    lm = open_frozen_lm(given, PromptSettings())
    assert (lm.identity, lm.parameters) == (f"openai:{endpoint.url}:m", 7)
    assert lm.generate(ask("say it"), GREEDY) == [Completion("it", 7, 3, "stop")]
