"""The OpenAI-compatible backend on a text-completion endpoint, and its scores by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lmcot.records import Choice, Completion, FailureKind, Message, Sampling, Score
from tests.support.endpoint import (
    Answer,
    Call,
    Endpoint,
    as_asked,
    ask,
    client,
    completion,
    failure,
)

YES_NO = ("yes", "no")
# "Is it?" is rendered as a line of its own; "Yes it is" goes on in the next.
TOKENS = ("Is", " it", "?", "\n", "Yes", " it", " is")
LOGPROBS = (None, -1.0, -2.0, -0.5, -0.25, -1.5, -0.125)
SCORE = Score(-1.875, 3, 7)


def _echo(
    call: Call,
    tokens: Sequence[str] = TOKENS,
    logprobs: Sequence[float | None] = LOGPROBS,
    missing: str = "",
) -> Answer:
    """The prompt with its tokens, and one more where at least one must be generated."""
    more = call.body["max_tokens"]
    all_tokens = [*tokens, *[" so"] * more]
    offsets = [sum(map(len, all_tokens[:index])) for index in range(len(all_tokens))]
    given: dict[str, Any] = {
        "tokens": all_tokens,
        "token_logprobs": [*logprobs, *[-9.0] * more],
        "text_offset": offsets,
        "top_logprobs": [None] * len(all_tokens),
    }
    return completion(call, call.body["prompt"] + " so" * more, **(given | {missing: None}))


def _score(endpoint: Endpoint, continuation: str = "Yes it is") -> Any:
    with client(endpoint, api="completions") as lm:
        return lm.score(ask("Is it?"), [continuation])[0]


def test_prompts_are_sent_as_plain_text(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: completion(call, " It is\n\nQ:")
    prompt = (
        Message("system", "Be brief."),
        Message("user", "Q: a"),
        Message("assistant", "b"),
        Message("user", "Q: c"),
    )
    with client(endpoint, api="completions") as lm:
        found = lm.generate([prompt], Sampling(max_new_tokens=5, seed=3, stop=("\n\n",)))
    assert found == [Completion(" It is", 7, 3, "stop")]
    assert endpoint.calls[0].path == "/v1/completions"
    assert endpoint.requests == [
        {
            "model": "m",
            "prompt": "Be brief.\n\nQ: a\nb\n\nQ: c\n",
            "max_tokens": 5,
            "temperature": 0.0,
            "seed": 3,
            "stop": ["\n\n"],
        }
    ]


def test_choice_from_the_first_token(endpoint: Endpoint) -> None:
    # e to the power of these: 0.5 and 0.1 for yes, 0.2 for no.
    shares = {"Yes": -0.6931471806, " yes": -2.302585093, "NO": -1.609437912, "It": -3.0}
    endpoint.respond = lambda call: completion(call, "Yes", shares)
    with client(endpoint, api="completions") as lm:
        found = lm.choose(ask("a"), YES_NO)[0]
    assert endpoint.requests[0]["logprobs"] == 20
    assert isinstance(found, Choice)
    assert found.probabilities == pytest.approx({"yes": 0.75, "no": 0.25})


def test_choice_from_the_text_where_log_probabilities_are_refused(endpoint: Endpoint) -> None:
    def without(call: Call) -> Answer:
        refused = Answer('{"error": {"message": "no"}}', 422)
        return refused if "logprobs" in call.body else as_asked(call)

    endpoint.respond = without
    with client(endpoint, api="completions", concurrency=1) as lm:
        found = lm.choose(ask("say No.", "say Yes!"), YES_NO)
    assert [one.probabilities["yes"] for one in found if isinstance(one, Choice)] == [0, 1]
    # As many alternatives as there may be, then fewer, then none, and none from then on.
    assert [request.get("logprobs") for request in endpoint.requests] == [20, 5, None, None]


def test_a_score_is_the_sum_over_the_continuation(endpoint: Endpoint) -> None:
    endpoint.respond = _echo
    assert _score(endpoint) == SCORE
    assert endpoint.requests == [
        {
            "model": "m",
            "prompt": "Is it?\nYes it is",
            "max_tokens": 1,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
        }
    ]
    endpoint.respond = lambda call: _echo(call, TOKENS[:4], LOGPROBS[:4])
    assert _score(endpoint, "") == Score(0.0, 0, 7)


def test_an_endpoint_that_writes_on_gives_no_scores(endpoint: Endpoint) -> None:
    """One token is asked for: to some servers none means that there is no limit."""

    def writes_on(call: Call) -> Answer:
        body = json.loads(_echo(call).body)
        body["usage"]["completion_tokens"] = 391
        return replace(_echo(call), body=json.dumps(body))

    endpoint.respond = writes_on
    assert "one token and wrote 391" in failure(_score(endpoint), FailureKind.PERMANENT)


def test_a_first_token_that_the_text_does_not_hold_moves_nothing(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: _echo(call, ("<s>", *TOKENS), (None, -3.0, *LOGPROBS[1:]))
    assert _score(endpoint) == SCORE


def test_scores_are_not_guessed_from_offsets_that_are_wrong(endpoint: Endpoint) -> None:
    # Without the spaces that they begin with, all tokens seem to be too far ahead.
    endpoint.respond = lambda call: _echo(call, tuple(token.lstrip(" ") for token in TOKENS))
    assert "offsets do not fit" in failure(_score(endpoint), FailureKind.PERMANENT)


@pytest.mark.parametrize("number", [None, float("nan"), float("-inf"), 0.7])
def test_impossible_numbers_count_only_in_the_continuation(
    endpoint: Endpoint, number: float | None
) -> None:
    endpoint.respond = lambda call: _echo(call, TOKENS, (number, *LOGPROBS[1:]))
    assert _score(endpoint) == SCORE
    endpoint.respond = lambda call: _echo(call, TOKENS, (*LOGPROBS[:4], number, *LOGPROBS[5:]))
    assert "log-probability" in failure(_score(endpoint), FailureKind.PERMANENT)


def test_tokens_are_found_without_offsets(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: _echo(call, missing="text_offset")
    assert _score(endpoint) == SCORE


@pytest.mark.parametrize("missing", ["tokens", "token_logprobs"])
def test_an_endpoint_that_tells_too_little_gives_no_scores(
    endpoint: Endpoint, missing: str
) -> None:
    endpoint.respond = lambda call: _echo(call, missing=missing)
    assert "no log-likelihoods" in failure(_score(endpoint), FailureKind.PERMANENT)


def test_an_endpoint_that_does_not_echo_gives_no_scores(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: replace(
        _echo(call), body=json.dumps({"choices": [{"text": "Of course", "logprobs": None}]})
    )
    assert "no log-likelihoods" in failure(_score(endpoint), FailureKind.PERMANENT)


def test_an_endpoint_that_refuses_to_echo_says_so(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: Answer('{"error": {"message": "echo is no use"}}', 400)
    reason = failure(_score(endpoint), FailureKind.PERMANENT)
    assert "refuses to score" in reason
    assert "echo is no use" in reason
    assert len(endpoint.calls) == 1
