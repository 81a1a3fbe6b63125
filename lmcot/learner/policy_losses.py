"""Policy losses: what makes the policy follow the advantages.

A loss is a function here and a settings class in `lmcot.config.training`. `POLICY_LOSSES` joins the
two by the settings' ``kind``. Entropy bonus, KL penalty and value loss are added elsewhere
(`lmcot.learner.objective`).

Every loss clips its ratio around the policy at the start of the step, however old the policy is
that sampled. What lies between these two is the importance weight's, which multiplies the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmcot.config.training import CispoLoss, GspoLoss, PolicyLossSettings, PpoLoss
from lmcot.learner import maths


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch of N tokens: whole responses end to end, without padding.

    All tensors are [N]. Only ``current`` is tracked by autograd.
    """

    current: Tensor
    """Log-probabilities under the policy that is being trained."""
    proximal: Tensor
    """Log-probabilities under the policy as it was at the start of the step."""
    behaviour: Tensor
    """Log-probabilities that the sampler reported."""
    importance_weight: Tensor
    """min(p_proximal / p_behaviour, ``refine.importance_cap``). A loss that does not multiply by it
    ignores that the sampler's policy was not exactly the learner's."""
    importance_cap: float
    """``refine.importance_cap``, for a loss that makes another weight."""
    advantages: Tensor
    """How much better each token was than expected."""
    response: Tensor
    """int64: the number of the response that a token belongs to, from 0 in the micro-batch."""
    step_tokens: float
    """Tokens of the whole optimiser step: all its micro-batches, on all ranks."""
    step_responses: int
    """Responses of the whole optimiser step."""

    def lengths(self) -> Tensor:
        """[N]: the number of tokens in each token's response."""
        return self._sums(torch.ones_like(self.advantages))

    def response_mean(self, values: Tensor) -> Tensor:
        """[N]: the mean of ``values`` over each token's response, as for a sequence's ratio."""
        return self._sums(values) / self.lengths()

    def token_scale(self, settings: PolicyLossSettings, max_length: int) -> Tensor:
        """[N]: the factors with which the mean over the step's tokens is the settings' average.

        Args:
            max_length: the length that a response may have at most, in tokens.
        """
        ones = torch.ones_like(self.advantages)
        if settings.aggregation == "token_mean":
            return ones
        share = self.step_tokens / self.step_responses
        if settings.aggregation == "sequence_mean":
            return ones * share / self.lengths()
        return ones * share / (settings.aggregation_length or max_length)

    def _sums(self, values: Tensor) -> Tensor:
        responses = int(self.response.max()) + 1
        return values.new_zeros(responses).index_add(0, self.response, values)[self.response]


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """A loss for each token, and what to log about it.

    The optimiser step minimises the average of ``loss`` that the settings' ``aggregation`` names,
    over all tokens of all its micro-batches and ranks.
    """

    loss: Tensor
    """[N]."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] for each name of `lmcot.monitor.catalogue`; the mean over the step's tokens is logged."""


PolicyLossFunction = Callable[[Any, LossInputs], LossOutputs]
"""From a loss's own settings and a micro-batch to each token's loss."""


def ppo(settings: PpoLoss, inputs: LossInputs) -> LossOutputs:
    """PPO's clipped loss, with an optional second bound for negative advantages."""
    ratio = maths.log_ratio(inputs.current, inputs.proximal).exp()
    low, high = settings.bounds
    clipped = maths.clipped_loss(ratio, inputs.advantages, low, high, settings.dual_clip)
    metrics = _clip_shares(clipped.low, clipped.high)
    if settings.dual_clip is not None:
        metrics["policy/dual_clip_fraction"] = clipped.dual
    return LossOutputs(clipped.loss * inputs.importance_weight, metrics)


def gspo(settings: GspoLoss, inputs: LossInputs) -> LossOutputs:
    """PPO's clipped loss of a response's mean ratio (geometric), the same at all its tokens."""
    logs = inputs.response_mean(inputs.current - inputs.proximal)
    ratio = logs.clamp(-maths.LOG_RATIO_BOUND, maths.LOG_RATIO_BOUND).exp()
    clipped = maths.clipped_loss(ratio, inputs.advantages, settings.clip_low, settings.clip_high)
    weight = maths.importance_weight(
        inputs.response_mean(inputs.proximal),
        inputs.response_mean(inputs.behaviour),
        inputs.importance_cap,
    )
    return LossOutputs(clipped.loss * weight, _clip_shares(clipped.low, clipped.high))


def cispo(settings: CispoLoss, inputs: LossInputs) -> LossOutputs:
    """Minus the log-probability times the advantage, weighted by the clipped ratio."""
    ratio = maths.log_ratio(inputs.current.detach(), inputs.proximal).exp()
    least = 0.0 if settings.clip_low is None else 1 - settings.clip_low
    clipped = ratio.clamp(least, 1 + settings.clip_high)
    loss = -clipped * inputs.importance_weight * inputs.advantages * inputs.current
    return LossOutputs(loss, _clip_shares((ratio < clipped).float(), (ratio > clipped).float()))


def _clip_shares(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    return {
        "policy/clip_fraction": low + high,
        "policy/clip_fraction_low": low,
        "policy/clip_fraction_high": high,
    }


POLICY_LOSSES: dict[str, PolicyLossFunction] = {"ppo": ppo, "gspo": gspo, "cispo": cispo}
"""The loss of each kind of settings."""


def policy_loss(settings: PolicyLossSettings, inputs: LossInputs) -> LossOutputs:
    """Each token's loss, by the function that the settings name."""
    return POLICY_LOSSES[settings.kind](settings, inputs)
