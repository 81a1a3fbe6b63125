"""Advantage estimators: how much better each token was than expected.

An estimator is a function here and a settings class in `lmcot.config.training`, which says what it
needs (a critic, several rationales for each question). `ESTIMATORS` joins the two by the settings'
``kind``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lmcot.config.training import AdvantageSettings, Gae, Grpo, ReinforcePlusPlus, Rloo
from lmcot.learner import maths


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """A step's rationales as an estimator sees them: B rationales, T response positions."""

    scores: Tensor
    """[B]: reward of each rationale, scaled and clipped, without a KL penalty."""
    kl: Tensor
    """[B, T]: k1 of each token to the reference."""
    kl_coefficient: float
    """Weight of the KL penalty in the rewards; 0 if the penalty is part of the loss."""
    values: Tensor
    """[B, T]: the critic's values; zeros without a critic."""
    mask: Tensor
    """[B, T]: 1 at each token of a response (EOS included), 0 at padding."""
    groups: Tensor
    """[B] int64: the number of each rationale's question."""

    def token_rewards(self) -> Tensor:
        """[B, T]: each token's KL penalty, and the rationale's score at its last token."""
        return maths.token_rewards(self.scores, self.kl, self.mask, self.kl_coefficient)

    def rewards(self) -> Tensor:
        """[B]: each rationale's score less the KL penalty of all its tokens."""
        return self.scores - self.kl_coefficient * (self.kl * self.mask).sum(-1)


class Estimate(NamedTuple):
    """Advantages, and what a critic learns to predict; [B, T] each, 0 at padding."""

    advantages: Tensor
    returns: Tensor


Estimator = Callable[[Any, AdvantageInputs], Estimate]
"""From an estimator's own settings and a step's rationales to the estimate."""


def of_rationales(advantages: Tensor, mask: Tensor) -> Estimate:
    """The estimate in which every token has its rationale's advantage ([B]); no returns."""
    return Estimate(advantages.unsqueeze(-1) * mask, mask.new_zeros(mask.shape))


def gae(settings: Gae, inputs: AdvantageInputs) -> Estimate:
    """Generalised advantage estimation; the advantages are whitened, the returns are not."""
    advantages, returns = maths.gae(
        inputs.token_rewards(), inputs.values, inputs.mask, settings.gamma, settings.lam
    )
    return Estimate(maths.whiten(advantages, inputs.mask), returns)


def rloo(settings: Rloo, inputs: AdvantageInputs) -> Estimate:
    """A reward less the mean of the question's other rewards."""
    return of_rationales(maths.rloo(inputs.rewards(), inputs.groups), inputs.mask)


def grpo(settings: Grpo, inputs: AdvantageInputs) -> Estimate:
    """A reward less the question's mean reward, over the standard deviation if so set."""
    advantages = maths.grpo(inputs.rewards(), inputs.groups, normalise=settings.normalise)
    return of_rationales(advantages, inputs.mask)


def reinforce_plus_plus(settings: ReinforcePlusPlus, inputs: AdvantageInputs) -> Estimate:
    """The discounted sum of the rewards from each token on, whitened over the step's tokens."""
    rewards, nothing = inputs.token_rewards(), inputs.mask.new_zeros(inputs.mask.shape)
    _, returns = maths.gae(rewards, nothing, inputs.mask, settings.gamma, lam=1.0)
    # In float64 equal float32 returns give exactly 0, not a rounding error over its deviation.
    advantages = maths.whiten(returns.double(), inputs.mask).to(returns.dtype)
    return Estimate(advantages, returns)


ESTIMATORS: dict[str, Estimator] = {
    "gae": gae,
    "rloo": rloo,
    "grpo": grpo,
    "reinforce++": reinforce_plus_plus,
}
"""The estimator of each kind of settings."""


def estimate(settings: AdvantageSettings, inputs: AdvantageInputs) -> Estimate:
    """Advantages and returns by the estimator that the settings name."""
    return ESTIMATORS[settings.kind](settings, inputs)
