"""Log-probabilities and entropies from logits over a vocabulary, in chunks of tokens.

The logits are a small model's largest tensor. Nothing of their size is made here but their
gradient, in their own dtype: forward and backward pass go through the tokens in chunks, in float32.
The results do not depend on the chunks, since each token's are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 2**22
"""Logits in one chunk: 16 MiB in float32, which a processor's cache may hold."""


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under logits divided by the sampling temperature.

    Args:
        logits: [..., V]; the logits that predict each token.
        ids: [...] int64.

    Returns:
        [...] float32.
    """
    apply: Any = _TokenLogprobs.apply
    found: Tensor = apply(logits.flatten(0, -2), ids.flatten(), temperature)
    return found.view(ids.shape)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each position's distribution: logits [..., V] to [...] float32."""
    apply: Any = _TokenEntropy.apply
    found: Tensor = apply(logits.flatten(0, -2), temperature)
    return found.view(logits.shape[:-1])


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def _scores(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def _float32(logits: Tensor) -> Tensor:
    """A float32 number for each token."""
    return torch.empty(len(logits), dtype=torch.float32, device=logits.device)


class _TokenLogprobs(torch.autograd.Function):
    """The score of a token less the log of the sum of all scores' exponentials."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        picked, total = _float32(logits), _float32(logits)
        for chunk in _chunks(logits):
            scores = _scores(logits[chunk], temperature)
            picked[chunk] = scores.gather(-1, ids[chunk].unsqueeze(-1)).squeeze(-1)
            total[chunk] = scores.logsumexp(-1)
        ctx.save_for_backward(logits, ids, total)
        ctx.temperature = temperature
        return picked - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, total = ctx.saved_tensors
        found = torch.empty_like(logits)
        for chunk in _chunks(logits):
            own = gradient[chunk].unsqueeze(-1)
            part = (_scores(logits[chunk], ctx.temperature) - total[chunk].unsqueeze(-1)).exp_()
            part.mul_(-own).scatter_add_(-1, ids[chunk].unsqueeze(-1), own)
            found[chunk] = part if ctx.temperature == 1 else part.div_(ctx.temperature)
        return found, None, None


class _TokenEntropy(torch.autograd.Function):
    """Minus the sum of p log p, whose derivative by a score is -p (log p + entropy)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        entropy = _float32(logits)
        for chunk in _chunks(logits):
            logprobs = _scores(logits[chunk], temperature).log_softmax(-1)
            entropy[chunk] = -(logprobs.exp() * logprobs).sum(-1)
        ctx.save_for_backward(logits, entropy)
        ctx.temperature = temperature
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, entropy = ctx.saved_tensors
        found = torch.empty_like(logits)
        for chunk in _chunks(logits):
            logprobs = _scores(logits[chunk], ctx.temperature).log_softmax(-1)
            part = logprobs.exp()
            part.mul_(logprobs.add_(entropy[chunk].unsqueeze(-1)))
            part.mul_(-gradient[chunk].unsqueeze(-1))
            found[chunk] = part if ctx.temperature == 1 else part.div_(ctx.temperature)
        return found, None
