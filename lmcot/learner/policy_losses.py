"""Policy losses: what makes the policy follow the advantages.

A loss is a function here and a settings class in `lmcot.config.training`. `POLICY_LOSSES` joins the
two by the settings' ``kind``. Entropy bonus, KL penalty and value loss are added elsewhere
(`lmcot.learner.objective`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmcot.config.training import PolicyLoss, PpoLoss
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

    def _sums(self, values: Tensor) -> Tensor:
        responses = int(self.response.max()) + 1
        return values.new_zeros(responses).index_add(0, self.response, values)[self.response]


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """A loss for each token, and what to log about it.

    The optimiser step minimises the mean of ``loss`` over all tokens of all its micro-batches and
    ranks. For another average, scale the tokens: with ``step_tokens / (step_responses *
    lengths())`` each response counts equally.
    """

    loss: Tensor
    """[N]."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] for each name of `lmcot.monitor.catalogue`; the mean over the step's tokens is logged."""


PolicyLossFunction = Callable[[Any, LossInputs], LossOutputs]
"""From a loss's own settings and a micro-batch to each token's loss."""


def ppo(settings: PpoLoss, inputs: LossInputs) -> LossOutputs:
    """PPO's clipped loss, with an optional second bound for negative advantages."""
    loss, clipped = maths.policy_loss(
        inputs.current, inputs.proximal, inputs.advantages, settings.clip, settings.dual_clip
    )
    return LossOutputs(loss * inputs.importance_weight, {"policy/clip_fraction": clipped})


POLICY_LOSSES: dict[str, PolicyLossFunction] = {"ppo": ppo}
"""The loss of each kind of settings."""


def policy_loss(settings: PolicyLoss, inputs: LossInputs) -> LossOutputs:
    """Each token's loss, by the function that the settings name."""
    return POLICY_LOSSES[settings.kind](settings, inputs)
