"""Checks an endpoint's log-likelihoods of given texts.

Some servers echo values that belong to the token before, or the same value for all; nothing in
a reply shows it. So the values are compared with each other at the start of a run.
"""

from __future__ import annotations

import math

from lmcot.frozen.openai.backend import OpenAILM
from lmcot.frozen.openai.replies import Reply, Tokens
from lmcot.frozen.openai.scores import to_score
from lmcot.records import Failure, Score

_TEXTS = (
    # What comes before, what follows in two parts, and the words of both parts in another order.
    (
        "The capital of France is Paris.",
        " The capital of Italy is",
        " Rome, and the capital of Spain is Madrid.",
        " is and capital Spain The. Madrid Italy of the is capital Rome, of",
    ),
    (
        "Water freezes when it is cold.",
        " In the winter, the lake",
        " was covered with ice and snow.",
        " with and covered the winter snow was. lake ice the In,",
    ),
)
_BEGINNINGS = (
    # The last word is unexpected: a model gives it another value than the word that follows.
    "The first of January is a holiday. My uncle eats seventeen harmonica",
    "One, two, three, four. In the kitchen there was an umbrella volcano",
    "She opened the door of the house and saw Wednesday piano",
    "The king of the country lived in a carrot dolphin",
)
_ABSOLUTE, _RELATIVE = 0.15, 0.02
"""Largest difference between two log-likelihoods of the same text: servers compute prompts and new
tokens in different batches, often in half precision."""


def wrong_scores(lm: OpenAILM) -> str:
    """Why the endpoint's log-likelihoods cannot be used; empty if they can.

    What must hold: a continuation's is the sum of its parts'; a token has the same whether it is
    generated or given; words in order are likelier than the same words out of order.

    Raises:
        EndpointError: if the endpoint does not answer, or refuses.
    """
    return _parts(lm) or _generated(lm)


def _parts(lm: OpenAILM) -> str:
    in_order = out_of_order = 0.0
    for before, first, second, shuffled in _TEXTS:
        found = [
            _score(lm, before, first + second),
            _score(lm, before, first),
            _score(lm, before + first, second),
            _score(lm, before, shuffled),
        ]
        for one in found:
            if isinstance(one, Failure):
                return one.reason
        whole, begun, ended, mixed = (one.logprob for one in found if isinstance(one, Score))
        if not _agree(whole, begun + ended):
            return _wrong(
                f"a text has {whole:.2f}, but its two parts have {begun:.2f} and {ended:.2f}"
            )
        in_order, out_of_order = in_order + whole, out_of_order + mixed
    if in_order > out_of_order + _ABSOLUTE:
        return ""
    return _wrong(
        f"sentences have {in_order:.2f}, and their words out of order {out_of_order:.2f}, which is "
        "no less"
    )


def _generated(lm: OpenAILM) -> str:
    """Compares the value of a token that is generated with its value in the echo."""
    compared = 0
    for text in _BEGINNINGS:
        token, generated = _next_token(lm, text)
        if generated is None or not token:
            continue
        echoed = _last_token(lm, text, token)
        if echoed is None:
            continue
        compared += 1
        if not _agree(generated, echoed):
            return _wrong(
                f"the token '{token.strip()}' has {generated:.2f} where it is generated, and "
                f"{echoed:.2f} where it is given"
            )
    return "" if compared else _wrong("no token's could be compared with that of the same text")


def _score(lm: OpenAILM, before: str, text: str) -> Score | Failure:
    whole = before + text
    return lm.client.run(
        lm.client.ask(lm.echo_body(whole), lambda reply: to_score(reply, len(before), whole))
    )


def _next_token(lm: OpenAILM, text: str) -> tuple[str, float | None]:
    """The token that the endpoint generates after a text, with its log-probability."""

    def read(reply: Reply) -> tuple[str, float | None]:
        tokens = reply.tokens or Tokens()
        if tokens.content:
            first = tokens.content[0]
            return first.token, first.logprob
        if not tokens.tokens or not tokens.token_logprobs:
            return "", None
        return tokens.tokens[0], tokens.token_logprobs[0]

    return lm.client.run(lm.client.ask(lm.echo_body(text, echo=False), read))


def _last_token(lm: OpenAILM, text: str, token: str) -> float | None:
    """The log-probability of a token at the end of an echoed text; None if it was cut otherwise."""
    whole = text + token

    def read(reply: Reply) -> float | None:
        one = to_score(reply, len(text), whole)
        return one.logprob if isinstance(one, Score) and one.tokens == 1 else None

    return lm.client.run(lm.client.ask(lm.echo_body(whole), read))


def _agree(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def _wrong(why: str) -> str:
    return f"the endpoint's log-likelihoods of given texts are wrong ({why})"
