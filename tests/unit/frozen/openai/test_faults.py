"""The OpenAI-compatible backend on an endpoint that is at fault, down to its sockets."""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import pytest

from lmcot.config import OpenAIFrozen
from lmcot.errors import UserError
from lmcot.frozen.needs import Needs
from lmcot.frozen.openai import client as openai_client
from lmcot.frozen.openai.backend import OpenAILM
from lmcot.frozen.openai.check import check_endpoint
from lmcot.records import Choice, Completion, Failure, FailureKind, Sampling, Score
from tests.support.endpoint import (
    FAULTS,
    Answer,
    Call,
    Endpoint,
    as_asked,
    ask,
    at_fault,
    check,
    client,
    completion,
    failure,
)

YES_NO = ("yes", "no")
GREEDY = Sampling(max_new_tokens=8)
TIMEOUT_S = 0.6
PERMANENT_FAULTS = ("empty", "nan")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a test can wait for."""
    monkeypatch.setattr(openai_client, "backoff_s", lambda attempt: 0.001)


def _in_order(call: Call) -> Answer:
    """A model that always says the same of the same, with numbers of its own for each text."""
    draw = random.Random(call.text)
    numbers = [draw.uniform(0.1, 5.0) for _ in range(32)]
    if call.body.get("echo"):
        text = call.body["prompt"]
        found = list(re.finditer(r" ?\w{1,4}|\W", text))
        return completion(
            call,
            text,
            tokens=[one[0] for one in found],
            token_logprobs=[None, *(-numbers[index % 32] for index in range(1, len(found)))],
            text_offset=[one.start() for one in found],
        )
    alternatives = {"Yes": -numbers[0], " no": -numbers[1]}
    return completion(call, f"yes, {numbers[2]}", alternatives)


def _half_faulty(call: Call) -> Answer:
    """One of the faults for half of all requests, told by what is asked and how often it was."""
    digest = hashlib.sha256(f"{json.dumps(call.body)} {call.attempt}".encode()).digest()
    fault = FAULTS[digest[1] % len(FAULTS)]
    return at_fault(fault, call, _in_order(call)) if digest[0] % 2 else _in_order(call)


def _everything(endpoint: Endpoint, api: str, **changes: Any) -> list[Any]:
    prompts = ask(*(f"Question {number}?" for number in range(40)))
    with client(endpoint, api=api, concurrency=16, read_timeout_s=TIMEOUT_S, **changes) as lm:
        found: list[Any] = [*lm.generate(prompts, GREEDY), *lm.choose(prompts, YES_NO)]
        if api == "completions":
            found += lm.score(prompts, [f"Because of {number}." for number in range(40)])
    return found


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_half_of_all_requests_at_fault_change_nothing(endpoint: Endpoint, api: str) -> None:
    endpoint.respond = _in_order
    right = _everything(endpoint, api)
    assert {type(one) for one in right} <= {Completion, Choice, Score}
    assert len({repr(one) for one in right}) == len(right)

    endpoint.respond = _half_faulty
    assert _everything(endpoint, api, max_retries=14) == right

    endpoint.reset()
    endpoint.respond = _half_faulty
    found = _everything(endpoint, api, max_retries=0)
    failed = [isinstance(one, Failure) for one in found]
    assert 0.3 < sum(failed) / len(failed) < 0.7
    for one, wanted, lost in zip(found, right, failed, strict=True):
        assert lost or one == wanted


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_returned_if_it_stays(endpoint: Endpoint, fault: str) -> None:
    def first(call: Call) -> Answer:
        answer = _in_order(call)
        return at_fault(fault, call, answer) if call.attempt == 1 else answer

    def always(call: Call) -> Answer:
        return at_fault(fault, call, _in_order(call))

    kind = FailureKind.PERMANENT if fault in PERMANENT_FAULTS else FailureKind.TRANSIENT
    with client(endpoint, max_retries=1, read_timeout_s=TIMEOUT_S, api="completions") as lm:
        endpoint.respond = first
        assert isinstance(lm.choose(ask("a"), YES_NO)[0], Choice)
        assert isinstance(lm.score(ask("a"), ["b"])[0], Score)
        endpoint.respond = always
        failure(lm.choose(ask("b"), YES_NO)[0], kind)
        if fault != "nan":  # a text has no numbers
            failure(lm.generate(ask("b"), GREEDY)[0], kind)
    assert len(endpoint.calls) == (6 if fault == "nan" else 8)


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [
        ((408, 409, 425, 429, 500, 502, 503, 504), FailureKind.TRANSIENT),
        ((400, 401, 403, 404, 422, 501, 505), FailureKind.PERMANENT),
    ],
)
def test_statuses_tell_whether_to_try_again(
    endpoint: Endpoint, statuses: tuple[int, ...], kind: FailureKind
) -> None:
    with client(endpoint, max_retries=2) as lm:
        *refused, said = lm.generate(ask(*map(str, statuses), "say fine"), GREEDY)
    for status, one in zip(statuses, refused, strict=True):
        assert str(status) in failure(one, kind)
    assert isinstance(said, Completion)
    tries = 3 if kind is FailureKind.TRANSIENT else 1
    assert len(endpoint.calls) == tries * len(statuses) + 1


def test_garbage_is_an_endpoint_out_of_order(endpoint: Endpoint) -> None:
    with client(endpoint) as lm:
        for one in lm.generate(ask("html", "broken", "other"), GREEDY):
            assert "not a completion" in failure(one, FailureKind.TRANSIENT)


def test_empty_replies_are_permanent_failures(endpoint: Endpoint) -> None:
    with client(endpoint) as lm:
        for one in lm.generate(ask("empty", "say  "), GREEDY):
            assert "no text" in failure(one, FailureKind.PERMANENT)


def test_impossible_log_probabilities_are_permanent_failures(endpoint: Endpoint) -> None:
    # As JSON has them; some endpoints write null for NaN.
    numbers = ["0.5", "Infinity", "-Infinity", "NaN", "null"]
    endpoint.respond = lambda call: completion(call, "Yes", {"Yes": json.loads(call.text)})
    with client(endpoint) as lm:
        for one in lm.choose(ask(*numbers), YES_NO):
            assert "log-probability" in failure(one, FailureKind.PERMANENT)


def test_a_lost_connection_is_transient() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        lm = OpenAILM(OpenAIFrozen(backend="openai", base_url=url, model="m", max_retries=0))
        assert "connection" in failure(lm.generate(ask("say a"), GREEDY)[0], FailureKind.TRANSIENT)
        lm.close()
        settings = OpenAIFrozen(backend="openai", base_url=url, model="m", max_retries=0)
        with pytest.raises(UserError, match=r"cannot be reached .*frozen\.base_url"):
            check_endpoint(settings, Needs(((ask("Hi")[0], GREEDY),)))


def test_a_reply_that_trickles_for_ever_ends_with_the_time(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: replace(as_asked(call), way="trickled")
    start = time.monotonic()
    with client(endpoint, total_timeout_s=0.5, max_retries=3) as lm:
        found = lm.generate(ask("say a"), GREEDY)
    assert "frozen.total_timeout_s = 0.5" in failure(found[0], FailureKind.TRANSIENT)
    assert time.monotonic() - start < 2.5


def test_retry_after_holds_all_requests_up(endpoint: Endpoint) -> None:
    def busy_at_first(call: Call) -> Answer:
        if len(endpoint.calls) == 1:
            return Answer("{}", 429, {"retry-after": "0.8"})
        return as_asked(call)

    endpoint.respond = busy_at_first
    with client(endpoint, concurrency=1, max_retries=1) as lm:
        assert isinstance(lm.generate(ask("say a"), GREEDY)[0], Completion)
    assert endpoint.times[1] - endpoint.times[0] >= 0.8

    endpoint.reset()
    endpoint.respond = busy_at_first
    with client(endpoint, max_retries=0) as lm:
        failure(lm.generate(ask("say a"), GREEDY)[0], FailureKind.TRANSIENT)
        lm.generate(ask("say b", "say c"), GREEDY)
    # Not the one that was refused, but all that come after it.
    assert len(endpoint.times) == 3
    assert endpoint.times[1] - endpoint.times[0] >= 0.8


@pytest.mark.parametrize("after", [lambda: "3600", lambda: formatdate(time.time() + 3600)])
def test_a_pause_beyond_the_time_limit_is_not_waited_for(
    endpoint: Endpoint, after: Callable[[], str]
) -> None:
    endpoint.respond = lambda call: Answer("{}", 503, {"retry-after": after()})
    start = time.monotonic()
    with client(endpoint, max_retries=3, concurrency=1) as lm:
        found = lm.generate(ask("say a", "say b"), GREEDY)
    for one in found:
        reason = failure(one, FailureKind.TRANSIENT)
        assert "would exceed frozen.total_timeout_s = 300" in reason
    assert len(endpoint.calls) == 1
    assert time.monotonic() - start < 5


def test_requests_keep_the_settings_pace(endpoint: Endpoint) -> None:
    # The third waits for two seconds, which do not count as the endpoint's.
    with client(endpoint, requests_per_minute=60, total_timeout_s=1.5) as lm:
        found = lm.generate(ask("say a", "say b", "say c"), GREEDY)
    assert all(isinstance(one, Completion) for one in found)
    assert endpoint.times[1] - endpoint.times[0] > 0.9
    assert endpoint.times[2] - endpoint.times[1] > 0.9


def test_tokens_keep_the_settings_pace_by_what_the_endpoint_counts(endpoint: Endpoint) -> None:
    # Estimated at 8 + 5 / 4 tokens, counted as 10; 20 in a second.
    with client(endpoint, tokens_per_minute=1200, concurrency=1) as lm:
        start = time.monotonic()
        lm.generate(ask(*["say a"] * 5), GREEDY)
    # The last begins when 40 are done, and goes ahead by what a second has room for beside it.
    assert time.monotonic() - start > 2.0 - (1.0 - 9.25 / 20) - 0.05


def test_a_first_request_that_is_answered_passes_the_check(endpoint: Endpoint) -> None:
    for api in ("chat", "completions"):
        endpoint.respond = lambda call: completion(call, "")
        found = check(endpoint, api=api, max_retries=0)
        assert any("without any text" in notice for notice in found.notices)
    assert [request["max_tokens"] for request in endpoint.requests] == [24, 24]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, r"refuses access .*variable MY_KEY, .*frozen\.api_key_env"),
        (403, r"refuses access .*variable MY_KEY"),
        (404, r"knows no model 'm', .*frozen\.model, frozen\.base_url"),
        (400, r"does not answer a first request .*400.*frozen\.model"),
        (503, r"does not answer a first request .*503.*frozen\.model"),
        (
            200,
            r"gives no completion .*does not speak the OpenAI API there; correct frozen\.base_url",
        ),
    ],
)
def test_a_check_that_fails_names_what_to_mend(
    endpoint: Endpoint, status: int, sentence: str
) -> None:
    endpoint.respond = lambda call: Answer("{}", status)
    with pytest.raises(UserError, match=sentence) as complaint:
        check(endpoint, api_key_env="MY_KEY", max_retries=6)
    assert "\n" not in str(complaint.value)
    # A refusal that names nothing is tried in other forms.
    assert len(endpoint.calls) == {200: 3, 503: 3, 400: 4}.get(status, 1)


def test_an_endpoint_that_is_down_fails_the_rest_of_a_batch_at_once(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would take its whole time, one after the other; and it is found up again."""
    monkeypatch.setattr(openai_client, "_PROBE_EVERY_S", 0.2)
    down = True

    def respond(call: Call) -> Answer:
        answer = _in_order(call)
        return at_fault("500", call, answer) if down else answer

    endpoint.respond = respond
    prompts = ask(*(f"Question {number}?" for number in range(200)))
    with client(endpoint, concurrency=2, max_retries=10_000, total_timeout_s=0.6) as lm:
        started = time.monotonic()
        found = lm.generate(prompts, GREEDY)
        assert time.monotonic() - started < 10  # and not 200 / 2 times 0.6 seconds
        reasons = [failure(one, FailureKind.TRANSIENT) for one in found]
        assert sum("answered nothing for" in reason for reason in reasons) > 150
        down = False
        time.sleep(0.25)
        assert isinstance(lm.generate(prompts[:1], GREEDY)[0], Completion)
        assert all(isinstance(one, Completion) for one in lm.generate(prompts, GREEDY))
