"""The log-likelihood of a given text, from the tokens that an endpoint echoes."""

from __future__ import annotations

import math

from lmcot.frozen.openai.replies import Faulty, Reply, Tokens
from lmcot.records import Failure, FailureKind, Score

_ROUNDING = 1e-4
"""Largest log-probability of a certain token: half-precision arithmetic may exceed 0 by this."""
_NO_SCORES = "the endpoint gives no log-likelihoods of a given text"
_MISFIT = "the endpoint's token offsets do not fit the text that it echoes"


def to_score(reply: Reply, start: int, whole: str) -> Score | Failure:
    """Log-likelihood of a text from its character ``start`` on, as the endpoint echoed it.

    Raises:
        Faulty: if there is no text, or a log-probability is invalid.
    """
    if reply.withheld:
        raise Faulty(reply.withheld, again=False)
    if not reply.text:
        raise Faulty("the endpoint's reply holds no text")
    if reply.tokens_out > 1 and not reply.estimated:
        reason = f"it was asked for one token and wrote {reply.tokens_out}"
        return Failure(FailureKind.PERMANENT, f"{_NO_SCORES}: {reason}")
    tokens = reply.tokens
    if tokens is None or not 0 < len(tokens.tokens) == len(tokens.token_logprobs):
        return Failure(FailureKind.PERMANENT, f"{_NO_SCORES}: it ignores echo or logprobs")
    if not reply.text.startswith(whole):
        return Failure(FailureKind.PERMANENT, f"{_NO_SCORES}: it does not repeat the text (echo)")
    places = _places(tokens, start, whole)
    if places is None:
        return Failure(FailureKind.PERMANENT, _MISFIT)
    counted = [
        logprob
        for place, logprob in zip(places, tokens.token_logprobs, strict=True)
        if start <= place < len(whole)
    ]
    if not counted and start < len(whole):
        return Failure(FailureKind.PERMANENT, _MISFIT)
    # Summed exactly: long continuations would lose digits.
    logprob = math.fsum(map(sound, counted))
    return Score(logprob, len(counted), reply.tokens_in, estimated=reply.estimated)


def sound(logprob: float | None) -> float:
    """Checks a log-probability, and returns it.

    Raises:
        Faulty: if it is invalid.
    """
    if logprob is None or not math.isfinite(logprob) or logprob > _ROUNDING:
        raise Faulty(f"the endpoint's reply holds an invalid log-probability: {logprob}")
    return logprob


def _places(tokens: Tokens, start: int, whole: str) -> list[int] | None:
    """Where each token begins in the text; None if that cannot be told."""
    given = _given_places(tokens, whole)
    if given is not None and all(
        _is_there(token, place, whole)
        for token, place in zip(tokens.tokens, given, strict=True)
        if start <= place < len(whole)
    ):
        return given
    return _found_places(tokens.tokens, start, whole)


def _given_places(tokens: Tokens, whole: str) -> list[int] | None:
    """The endpoint's own offsets.

    Some endpoints (vLLM) count the characters of the BOS token that they put first, though the
    text does not hold it.
    """
    if len(tokens.text_offset) != len(tokens.tokens):
        return None
    first = tokens.tokens[0]
    counts_bos = not whole.startswith(first) and tokens.text_offset[1:2] == [len(first)]
    return [offset - len(first) * counts_bos for offset in tokens.text_offset]


def _is_there(token: str, offset: int, text: str) -> bool:
    """Whether the token is at this place: some endpoints lose the spaces that tokens begin with.

    True for tokens that are parts of characters, which are written in many ways.
    """
    plain = token.isascii() and not token.startswith("bytes:")
    return not plain or text.startswith(token, offset)


def _found_places(tokens: list[str], start: int, whole: str) -> list[int] | None:
    """Finds the tokens' places by matching them with the text in order.

    Parts of characters (written as U+FFFD, ``bytes:`` or nothing) cannot be compared: they lie
    between the tokens around them, over characters that are not ASCII. None if a token does not
    fit, or if ``start`` lies within such a stretch: which of the parts come after it is not known.
    """
    first, *others = tokens
    not_in_text = not whole.startswith(first) and bool(others) and bool(others[0])
    skipped = int(not_in_text and whole.startswith(others[0]))  # BOS
    places = [0] * skipped
    at, parts = 0, False
    for token in tokens[skipped:]:
        plain, part = _split_part(token)
        if plain or not part:
            here = _next_place(plain, at, whole) if parts else at
            if here is None or not whole.startswith(plain, here):
                # What was generated lies beyond the text.
                if not _only_parts(whole[at:], parts):
                    return None
                here, plain = len(whole), ""
            if at < start < here:
                return None
            at, parts = here, False
        places.append(at)
        at += len(plain)
        parts = parts or part
    return places if _only_parts(whole[at:], parts) else None


def _split_part(token: str) -> tuple[str, bool]:
    """The part of a token that can be compared, and whether part of a character follows it."""
    if token.startswith("bytes:"):
        return "", True
    plain, mark, _ = token.partition("\ufffd")
    return plain, bool(mark) or not plain


def _only_parts(rest: str, parts: bool) -> bool:
    """Whether parts of characters account for the rest of the text."""
    return not rest or (parts and not any(map(str.isascii, rest)))


def _next_place(token: str, at: int, whole: str) -> int | None:
    """Where the token comes next, with no ASCII in between that no token accounts for."""
    while at < len(whole):
        if whole.startswith(token, at):
            return at
        if whole[at].isascii():
            return None
        at += 1
    return None
