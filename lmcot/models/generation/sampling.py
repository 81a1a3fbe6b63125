"""Draws tokens from logits with one uniform number per row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_CHUNK = 256
"""Tokens per chunk; chunk sums tell which single chunk to search."""


def uniforms(seed: int, length: int) -> Tensor:
    """Uniform float64 numbers in [0, 1), [length], from a new CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(length, generator=generator, dtype=torch.float64)


def pick(logits: Tensor, temperatures: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token for each row.

    The cumulative distribution is inverted at the row's own number, so that the token does not
    depend on the other rows of the batch.

    Args:
        logits: [rows, vocabulary]
        temperatures: [rows] float32; 0 takes the most likely token, with its log-probability at
            temperature 1.
        uniform: [rows] float64 in [0, 1).

    Returns:
        tokens [rows] int64; their log-probabilities [rows] float32; whether the row is a valid
        distribution [rows], which it is not if a logit is NaN or +inf, or all are -inf.
    """
    greedy = temperatures == 0
    scores = logits.float()
    if bool(((temperatures != 1) & ~greedy).any()):
        scores = scores / temperatures.where(~greedy, 1.0).unsqueeze(-1)
    total = scores.logsumexp(-1)
    valid = total.isfinite()
    if bool(greedy.all()):
        tokens = scores.argmax(-1)
    else:
        tokens = _invert(torch.exp(scores - total.unsqueeze(-1)), uniform)
        if bool(greedy.any()):
            tokens = tokens.where(~greedy, scores.argmax(-1))
    return tokens, scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - total, valid


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative sum exceeds ``uniform`` times the total: [rows].

    Sums are in float64, so that rounding does not favour the end of the vocabulary.
    """
    rows, vocabulary = probabilities.shape
    if vocabulary % _CHUNK:
        probabilities = pad(probabilities, (0, _CHUNK - vocabulary % _CHUNK))
    chunks = probabilities.view(rows, -1, _CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    target = _below(uniform.to(ends.device) * ends[:, -1], ends[:, -1])
    chunk = _first_above(ends, target)
    each = torch.arange(rows, device=ends.device)
    inner = chunks[each, chunk].double().cumsum(-1)
    rest = (target - ends[each, chunk] + sums[each, chunk]).clamp_min(0)
    found = chunk * _CHUNK + _first_above(inner, _below(rest, inner[:, -1]))
    return found.clamp_max(vocabulary - 1)  # rows without a distribution only


def _below(value: Tensor, bound: Tensor) -> Tensor:
    """Limits ``value`` below ``bound``, so that rounding never selects a token of probability 0."""
    return value.minimum(torch.nextafter(bound, torch.zeros_like(bound)))


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    found = torch.searchsorted(ends, target.unsqueeze(-1), right=True).squeeze(-1)
    return found.clamp_max(ends.shape[-1] - 1)
