"""Log-likelihoods that an endpoint echoes: where tokens lie in the text, and whether to believe."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from lmcot.frozen.needs import Needs
from lmcot.frozen.openai.replies import Reply, Tokens
from lmcot.frozen.openai.scores import to_score
from lmcot.records import Failure, Score
from tests.support.endpoint import Answer, Call, Endpoint, check, completion

SCORES = Needs((), scores=True)


def _tokens(text: str) -> list[str]:
    return re.findall(r" ?\w+|[^\w]", text)


@cache
def _pairs() -> set[tuple[str, str]]:
    """Words that follow one another in plain English, as this model knows it."""
    known = (
        "The capital of France is Paris. The capital of Italy is Rome, and the capital of Spain is "
        "Madrid.|Water freezes when it is cold. In the winter, the lake was covered with ice and "
        "snow."
    )
    return {pair for part in known.split("|") for pair in pairwise(_tokens(part))}


def _logprob(before: str, token: str) -> float:
    """A model of pairs of words: what it has not seen is unlikely, each in its own measure."""
    if (before, token) in _pairs():
        return -0.5
    if token == " then":
        return -1.25  # what it says where it knows nothing
    return -random.Random(token).uniform(6, 12)


def _values(tokens: Sequence[str]) -> list[float | None]:
    return [None, *(_logprob(a, b) for a, b in pairwise(tokens))]


def _right(values: list[float | None]) -> list[float | None]:
    return values


def _shifted(values: list[float | None]) -> list[float | None]:
    """As a server gives each token the value of the one before."""
    return [None, None, *values[1:-1]]


def _shifted_back(values: list[float | None]) -> list[float | None]:
    return [*values[1:], -3.0]


def _constant(values: list[float | None]) -> list[float | None]:
    return [None, *[-1.0] * (len(values) - 1)]


def _by_length(values: list[float | None]) -> list[float | None]:
    return [None, *[-1.0 - 0.01 * len(values)] * (len(values) - 1)]


def _server(how: Callable[[list[float | None]], list[float | None]]) -> Callable[[Call], Answer]:
    def respond(call: Call) -> Answer:
        prompt = _tokens(call.body["prompt"])
        next_token = " then"
        generated = _logprob(prompt[-1], next_token)
        if not call.body.get("echo"):
            return completion(call, next_token, tokens=[next_token], token_logprobs=[generated])
        values = [one if one is not None else -5.0 for one in how(_values(prompt))]
        values[0] = None  # type: ignore[call-overload]
        tokens = [*prompt, next_token]
        return completion(
            call,
            "".join(tokens),
            tokens=tokens,
            token_logprobs=[*values, generated],
            text_offset=[sum(map(len, tokens[:n])) for n in range(len(tokens))],
        )

    return respond


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (_right, None),
        (_shifted, "the token 'then' has -1.25 where it is generated"),
        (_shifted_back, "wrong"),
        (_constant, "out of order"),
        (_by_length, "its two parts have"),
    ],
)
def test_values_are_believed_only_where_they_hold(
    endpoint: Endpoint,
    how: Callable[[list[float | None]], list[float | None]],
    said: str | None,
) -> None:
    endpoint.respond = _server(how)
    found = check(endpoint, SCORES, api="completions")
    assert set(found.lacks) == (set() if said is None else {"score"})
    if said is not None:
        assert said in found.lacks["score"]
        assert "log-likelihoods of given texts are wrong" in found.lacks["score"]
    assert all(body["max_tokens"] == 1 for body in endpoint.requests)


def test_rounding_of_half_precision_is_borne(endpoint: Endpoint) -> None:
    draw = random.Random(0)

    def rounded(values: list[float | None]) -> list[float | None]:
        return [None if one is None else one + draw.uniform(-0.01, 0.01) for one in values]

    endpoint.respond = _server(rounded)
    assert not check(endpoint, SCORES, api="completions").lacks


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer('{"error": {"message": "echo is not supported"}}', 400), "echo is not supported"),
        (Answer('{"error": {"message": "max_new_tokens must be > 0"}}', 500), "max_new_tokens"),
        (Answer('{"choices": [{"text": " then", "logprobs": null}]}'), "ignores echo or logprobs"),
    ],
)
def test_an_endpoint_without_echoes_lacks_scores(
    endpoint: Endpoint, answer: Answer, said: str
) -> None:
    endpoint.respond = lambda call: answer
    assert said in check(endpoint, SCORES, api="completions").lacks["score"]


def _score(
    tokens: Sequence[str], whole: str, start: int, offsets: Sequence[int] = ()
) -> Score | Failure:
    """With -1, -2, -4 and so on as the values, so that a sum tells which were counted."""
    values: list[float | None] = [-float(2**n) for n in range(len(tokens))]
    given: dict[str, Any] = {"token_logprobs": values, "text_offset": offsets}
    return to_score(
        Reply(whole + " x", False, 9, 1, tokens=Tokens(tokens=list(tokens), **given)), start, whole
    )


BAD = "\ufffd"


@pytest.mark.parametrize(
    ("tokens", "whole", "start", "counted"),
    [
        (["Is", " it", "?", "\n", "Yes", " x"], "Is it?\nYes", 7, [4]),
        # A beginning that the text does not hold.
        (["<s>", "Is", " it", " x"], "Is it", 2, [2]),
        # A rationale that was cut within a character: U+FFFD as three parts, or as nothing.
        (["So", " it", BAD, BAD, BAD, " x"], f"So it{BAD}", 2, [1, 2, 3, 4]),
        (["So", "", "", " it", " x"], f"So{BAD} it", 2, [1, 2, 3]),
        (["So", " ", BAD, " it", " x"], f"So {BAD} it", 2, [1, 2, 3]),
        (["So", f" {BAD}", BAD, " it", " x"], "So \U0001f600 it", 2, [1, 2, 3]),
        (["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", " it", " x"], "\U0001f600 it", 1, [2]),
        (["a", "\u4f60", "\u597d", " x"], "a\u4f60\u597d", 1, [1, 2]),
        # It cannot be told which of the parts come after the beginning.
        (["So", BAD, BAD, " it", " x"], "So\u4f60\u597d it", 3, None),
        # Tokens without the spaces that they begin with lie nowhere.
        (["So", "it", " x"], "So it", 2, None),
        (["So", BAD, "it", " x"], "So it", 2, None),
    ],
)
def test_tokens_are_laid_along_the_text(
    tokens: list[str], whole: str, start: int, counted: list[int] | None
) -> None:
    found = _score(tokens, whole, start)
    if counted is None:
        assert isinstance(found, Failure)
        assert "offsets do not fit" in found.reason
    else:
        assert isinstance(found, Score)
        assert found.tokens == len(counted)
        assert found.logprob == -math.fsum(2.0**n for n in counted)


def test_offsets_that_fit_are_taken() -> None:
    """Raw names of tokens, as in a vocabulary, cannot be laid along the text."""
    found = _score(["So", "\u0120it", "\u0120x"], "So it", 2, [0, 2, 5])
    assert isinstance(found, Score)
    assert found.logprob == -2
