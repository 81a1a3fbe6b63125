"""Requests to the generation engine and its events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lmcot.records import Failure, FailureKind

FinishReason = Literal["eos", "length", "stop"]
StopRule = Callable[[Sequence[int]], bool]
"""Given the tokens of one sample so far, says whether the sample ends there."""

_COLDEST, _HOTTEST = 1e-3, 1e3
_MOST_TOKENS = 2**20
"""Maximum tokens of one sample; a random number is drawn for each in advance."""


class EngineLost(RuntimeError):
    """A process of the engine has died, and the engine with it: only a new one can take over."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A request for samples that continue a prompt."""

    prompt_ids: Sequence[int]
    """Token ids of the prompt; an encoder-decoder reads them in its encoder."""
    seeds: Sequence[int]
    """One seed per sample, for its own random generator."""
    max_new_tokens: int
    temperature: float = 1.0
    """Temperature of the model's full distribution; 0 is greedy."""
    eos_ids: frozenset[int] = frozenset()
    stop: StopRule | None = None
    deadline: float | None = None
    """Time by ``time.monotonic()`` after which an unfinished request fails."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A request for the log-probabilities of given continuations of a prompt."""

    prompt_ids: Sequence[int]
    continuations: Sequence[Sequence[int]]
    """Token ids of the continuations, none of which is empty."""
    deadline: float | None = None


Request = SampleRequest | ScoreRequest


@dataclass(frozen=True, slots=True)
class Generated:
    """One finished sample."""

    response_ids: tuple[int, ...]
    """Token ids of the sample, including EOS if it was drawn."""
    logprobs: tuple[float, ...]
    """Log-probability (natural log) of each token under the sampling distribution; for a greedy
    sample under the model's own."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A new token of a sample."""

    request: int
    sample: int
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class SampleEvent:
    """A sample is complete."""

    request: int
    sample: int
    generated: Generated


@dataclass(frozen=True, slots=True)
class ScoreEvent:
    """A `ScoreRequest` is complete."""

    request: int
    logprobs: tuple[tuple[float, ...], ...]
    """Log-probabilities (natural log) of each token of each continuation."""


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """A request has failed as a whole; no more events follow."""

    request: int
    failure: Failure


Event = TokenEvent | SampleEvent | ScoreEvent | FailureEvent


def unfit(
    request: Request, vocabulary: int, window: int | None, encoder_decoder: bool
) -> Failure | None:
    """The failure of an invalid request; None if it is valid.

    Args:
        vocabulary: size of the model's vocabulary.
        window: number of the model's positions; None if unlimited.
    """
    reason = _fault(request) or _unknown(request, vocabulary)
    if reason is None and window is not None:
        reason = _too_long(request, window, encoder_decoder)
    return None if reason is None else Failure(FailureKind.PERMANENT, reason)


def tokens_after(request: Request) -> int:
    """The maximum number of tokens after the prompt."""
    if isinstance(request, SampleRequest):
        return request.max_new_tokens
    return max(len(continuation) for continuation in request.continuations)


def _fault(request: Request) -> str | None:
    if not request.prompt_ids:
        return "the prompt is empty"
    if isinstance(request, ScoreRequest):
        if not request.continuations or not all(request.continuations):
            return "a continuation is empty"
        return None
    if not request.seeds:
        return "no samples are asked for"
    if request.max_new_tokens < 1:
        return f"max_new_tokens is {request.max_new_tokens}, but must be 1 or more"
    if request.max_new_tokens > _MOST_TOKENS:
        return f"max_new_tokens is {request.max_new_tokens}, more than {_MOST_TOKENS}"
    temperature = request.temperature
    fits = temperature == 0 or _COLDEST <= temperature <= _HOTTEST
    if not math.isfinite(temperature) or not fits:
        return f"the temperature is {temperature}, but must be 0 or {_COLDEST} to {_HOTTEST}"
    for seed in request.seeds:
        if not 0 <= seed < 2**63:
            return f"the seed {seed} is not between 0 and 2**63 - 1"
    return None


def _unknown(request: Request, vocabulary: int) -> str | None:
    read = [request.prompt_ids]
    if isinstance(request, ScoreRequest):
        read.extend(request.continuations)
    for tokens in read:
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            return f"a token is not among the model's {vocabulary}: another model's tokenizer?"
    return None


def _too_long(request: Request, window: int, encoder_decoder: bool) -> str | None:
    prompt, more = len(request.prompt_ids), tokens_after(request)
    # The decoder of an encoder-decoder counts positions from 0 again.
    needed = max(prompt, more) if encoder_decoder else prompt + more
    if needed <= window:
        return None
    return (
        f"a prompt of {prompt} tokens and {more} tokens after it do not fit into the model's "
        f"{window} positions"
    )
