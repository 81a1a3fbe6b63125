"""PPO's arithmetic as pure functions of tensors.

Shapes: B rationales, T response positions, N tokens of several responses end to end. ``mask``
[B, T] is 1 at every token of a response (EOS included) and 0 at padding. A function that works
token by token takes any shape, written [...]. Log-probabilities and KL are in nats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to plus or minus this before exp, which then stays finite."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is 1: [B, T] to a scalar; 0 if the mask is all zeros."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased estimate of KL(policy || reference) per token: log p - log q.

    Schulman 2020, "Approximating KL divergence". Can be negative for a sample.
    """
    return logprobs - reference


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, low variance; as a loss its gradient is the KL's."""
    return (logprobs - reference).square() / 2


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased and never negative: q/p - 1 - log(q/p)."""
    ratio = log_ratio(reference, logprobs)
    # Not exp(x) - 1: float32 would lose a small x beside 1, and the result go below 0.
    return ratio.expm1() - ratio


def log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """log(p / q) of two log-probabilities, clamped so that its exponential stays finite; [...]."""
    return (numerator - denominator).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Per-token rewards: the KL penalty everywhere, the score on the last valid token.

    Ziegler et al. 2019, equation 2.

    Args:
        scores: [B] reward of each rationale.
        kl: [B, T] KL of each token (k1).

    Returns:
        [B, T].
    """
    rewards = -coefficient * kl * mask
    last = mask.sum(-1).long() - 1
    rows = torch.arange(mask.shape[0], device=mask.device)
    rewards[rows, last] += scores
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

    A rationale ends with its last valid token; there is no bootstrap value beyond it.

    Args:
        rewards, values, mask: [B, T]; each row is valid from 0 to its length.

    Returns:
        advantages and returns (advantages + values), [B, T], 0 at padding.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
        next_value = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """Leave-one-out advantages: a reward less the mean of its group's other rewards.

    Ahmadian et al. 2024, "Back to Basics", equation 8.

    Args:
        rewards: [B].
        groups: [B] int64, the same number for the rationales of one question; at least two each.

    Returns:
        [B].
    """
    count, centred = _centred(rewards, groups)
    return (centred * count / (count - 1)).to(rewards.dtype)


def grpo(rewards: Tensor, groups: Tensor, *, normalise: bool = True) -> Tensor:
    """Group-relative advantages: a reward less its group's mean, over its standard deviation.

    Shao et al. 2024, "DeepSeekMath", section 4.1.2; without the division Liu et al. 2025,
    "Understanding R1-Zero-Like Training", section 3. The deviation is the sample's (n - 1).

    Args:
        rewards: [B].
        groups: [B] int64, the same number for the rationales of one question; at least two each.

    Returns:
        [B]; 0 for a group whose rewards are all equal.
    """
    count, centred = _centred(rewards, groups)
    if normalise:
        total = torch.zeros_like(centred).index_add_(0, groups, centred.square())
        centred = centred / ((total[groups] / (count - 1)).sqrt() + 1e-6)
    return centred.to(rewards.dtype)


def _centred(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Size of each reward's group, and the reward less the group's mean; float64 [B] each.

    In float64, equal float32 rewards give exactly 0. In float32 they would give the mean's
    rounding error, which dividing by their deviation makes as large as a real advantage.
    """
    rewards = rewards.double()
    zeros = torch.zeros_like(rewards)  # group numbers are below B
    count = zeros.index_add(0, groups, torch.ones_like(rewards))
    total = zeros.index_add(0, groups, rewards)
    return count[groups], rewards - (total / count.clamp_min(1))[groups]


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Scales to unit variance over the masked positions; subtracts the mean unless it is kept.

    Advantages lose their mean, rewards keep it. [B, T] to [B, T], 0 at padding.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened + mean if keep_mean else whitened) * mask


def importance_weight(proximal: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """min(p_proximal / p_behaviour, cap) per token, [...].

    Corrects for a sampler whose weights are older than the learner's, or whose arithmetic differs.
    """
    return log_ratio(proximal, behaviour).exp().clamp_max(cap)


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """How many samples of equal weight tell as much, as a share of all: (sum w)^2 / (n sum w^2).

    Kish 1965. 1 where all weights are equal.

    Args:
        weights, mask: [B, T].
    """
    weights = weights * mask
    squares = weights.square().sum() * mask.sum()
    return weights.sum().square() / squares.clamp_min(torch.finfo(weights.dtype).tiny)


class Clipped(NamedTuple):
    """The clipped loss of each token, and 1 where a bound was active, else 0; [...] each."""

    loss: Tensor
    low: Tensor
    """The ratio of a token with a negative advantage was below the lower bound."""
    high: Tensor
    """The ratio of a token with a positive advantage was above the upper bound."""
    dual: Tensor
    """The loss of a token with a negative advantage was above the dual clip's bound."""


def clipped_loss(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> Clipped:
    """PPO's clipped loss per token (Schulman et al. 2017, equation 7).

    The bounds of the ratio are 1 - low and 1 + high (Yu et al. 2025, equation 8). With
    ``dual_clip`` c > 1, the loss for a negative advantage A is at most -c A (Ye et al. 2020,
    equation 5).
    """
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)
    active = clipped > plain
    bounded = torch.zeros_like(active)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    return Clipped(
        loss,
        low=(active & (advantages < 0)).float(),
        high=(active & (advantages > 0)).float(),
        dual=bounded.float(),
    )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Clipped squared error per token, half the larger of the two, [...]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the masked positions; 0 if undefined."""
    error = returns - values
    variance = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    if variance <= 1e-12:
        return 0.0
    residual = masked_mean((error - masked_mean(error, mask)).square(), mask)
    return float(1 - residual / variance)
