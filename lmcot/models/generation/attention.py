"""Attention in parts, over a shared prefix and over each row's own tokens, and the merge.

Softmax attention over keys in several places is the average of the attention over each place,
weighted by its sum of exponentials (the log-sum-exp merge: Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax"; Juravsky et al. 2024, "Hydragen", for prefixes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_LOWEST = -1e30
"""The maximum over no scores; finite, because infinities cannot be subtracted."""


class Scoring(NamedTuple):
    """How a layer turns query-key products into scores."""

    scale: float
    softcap: float | None = None
    """If set, scores become ``softcap * tanh(score / softcap)``."""


class Partial(NamedTuple):
    """Attention of queries over some of their keys, in float32."""

    total: Tensor
    """[..., queries, width] sum of values weighted by ``exp(score - greatest)``"""
    greatest: Tensor
    """[..., queries] greatest score"""
    mass: Tensor
    """[..., queries] sum of ``exp(score - greatest)``"""

    def normalised(self) -> Tensor:
        """Attention over these keys alone: [..., queries, width]."""
        return self.total / self.mass.unsqueeze(-1)


def attend_partly(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, bias: Tensor | None = None
) -> Partial:
    """Unnormalised attention over some of the keys.

    Args:
        query: [..., queries, width]
        key: [..., keys, width]
        value: [..., keys, value width]
        bias: added to the scores, -inf where a key is hidden; broadcasts to
            [..., queries, keys].
    """
    scores = torch.matmul(query * scoring.scale, key.transpose(-1, -2)).float()
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if bias is not None:
        scores = scores + bias
    greatest = scores.amax(-1)
    if bias is not None:
        greatest = greatest.clamp_min(_LOWEST)
    weights = scores.sub_(greatest.unsqueeze(-1)).exp_()
    return Partial(torch.matmul(weights.to(value.dtype), value).float(), greatest, weights.sum(-1))


def attend_wholly(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, bias: Tensor | None = None
) -> Tensor:
    """Attention as in `attend_partly`, but over all keys: [rows, heads, queries, width]."""
    if scoring.softcap is not None:
        part = attend_partly(query, key, value, scoring, bias)
        return part.normalised().to(query.dtype)
    mask = None if bias is None else bias.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scoring.scale)


def join(parts: Sequence[Partial]) -> Partial:
    """Concatenates parts of [slots, heads, ...] and appends an empty slot."""
    total, mass = parts[0].total, parts[0].mass
    nothing = Partial(
        total.new_zeros(1, *total.shape[1:]),
        mass.new_full((1, mass.shape[1]), _LOWEST),
        mass.new_zeros(1, mass.shape[1]),
    )
    return Partial(*(torch.cat(field) for field in zip(*parts, nothing, strict=True)))


def merge(parts: Partial, members: Tensor) -> Tensor:
    """Attention of each row over all its keys, merged from parts.

    Args:
        parts: total [slots, heads, width], greatest and mass [slots, heads]
        members: [rows, parts] slots of each row

    Returns:
        [rows, heads, width]
    """
    greatest = parts.greatest[members]
    weights = torch.exp(greatest - greatest.amax(1, keepdim=True))
    mass = (weights * parts.mass[members]).sum(1)
    total = (weights.unsqueeze(-1) * parts.total[members]).sum(1)
    return total / mass.unsqueeze(-1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    causal: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one sequence's tokens over all keys.

    Args:
        query: [heads, queries, width]
        key: [key heads, keys, width]; ``heads`` is a multiple of ``key heads``
        value: [key heads, keys, width]
        causal: whether each query only sees keys up to its own; needs as many queries as keys.
        bias: as in `attend_partly`; broadcasts to [heads, queries, keys].

    Returns:
        [heads, queries, width]
    """
    heads, queries, width = query.shape
    shared = heads // key.shape[0]
    if scoring.softcap is None:
        return scaled_dot_product_attention(
            query.unsqueeze(0),
            key.unsqueeze(0),
            value.unsqueeze(0),
            attn_mask=None if bias is None else _four_dimensions(bias.to(query.dtype)),
            is_causal=causal,
            scale=scoring.scale,
            enable_gqa=shared > 1,
        ).squeeze(0)
    if causal:
        bias = torch.full((queries, queries), -torch.inf, device=query.device).triu(1)
    grouped = query.reshape(key.shape[0], shared, queries, width)
    if bias is not None:
        bias = bias.expand(heads, queries, -1).reshape(*grouped.shape[:3], -1)
    part = attend_partly(grouped, key.unsqueeze(1), value.unsqueeze(1), scoring, bias)
    return part.normalised().to(query.dtype).reshape(heads, queries, -1)


def _four_dimensions(bias: Tensor) -> Tensor:
    """The bias in the form in which torch's fused kernel takes it on CPUs."""
    return bias.reshape(1, -1, *bias.shape[-2:])
