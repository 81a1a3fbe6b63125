"""What an optimiser step minimises: the policy's loss, and the terms that are added to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmcot.config import RefineSettings
from lmcot.learner import maths
from lmcot.learner.batching import BatchPlanner, MicroBatch
from lmcot.learner.engine import TrainEngine
from lmcot.learner.experience import Experience, ExperienceTokens
from lmcot.learner.policy_losses import LossInputs, policy_loss
from lmcot.learner.vocabulary import token_entropy, token_logprobs


@dataclass(frozen=True, slots=True)
class Update:
    """What all micro-batches of one optimiser step share, on all ranks."""

    indices: list[int]
    """The rationales that the step learns from."""
    tokens: float
    """The number of their tokens."""
    without_gradient: frozenset[int]
    """Those of them whose loss has no gradient, so that they need no backward pass."""
    kl_coefficient: float
    """Weight of the KL penalty in the loss."""
    critic_only: bool
    """Whether the policy stands still while the critic warms up."""


@dataclass(frozen=True, slots=True)
class MicroLoss:
    """The loss of one micro-batch."""

    loss: Tensor
    """Sum over the tokens, a scalar with a gradient."""
    metrics: dict[str, Tensor]
    """Sums over the tokens, scalars."""
    log_ratios: Tensor
    """[N]: log of current over proximal, clamped."""


class Objective:
    """Policy loss - entropy bonus + KL penalty, and the value loss.

    The settings' aggregation averages the first three; the value loss is a mean over the step's
    tokens.
    """

    def __init__(
        self,
        engine: TrainEngine,
        planner: BatchPlanner,
        settings: RefineSettings,
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        self._engine = engine
        self._planner = planner
        self._settings = settings
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens

    def follows_advantages_only(self, kl_coefficient: float) -> bool:
        """Whether a rationale whose advantages are all 0 adds nothing to the gradient."""
        settings = self._settings
        return (
            settings.loss.follows_advantages_only
            and settings.advantage.critic_baseline is None
            and settings.entropy_coefficient == 0
            and (settings.kl.apply_to == "reward" or kl_coefficient == 0)
        )

    def loss(self, experience: Experience, micro: MicroBatch, update: Update) -> MicroLoss:
        """Forward pass and loss of one micro-batch."""
        batch = self._planner.lay_out(experience.pairs, micro)
        logits, values = self._engine.forward(batch, values=True, head_only=update.critic_only)
        current = token_logprobs(logits, batch.targets.to(logits.device), self._temperature)
        old = experience.tokens(micro.indices, logits.device)
        proximal = self._proximal(experience, micro, current, old)
        inputs = self._loss_inputs(current, proximal, old, update)
        policy = policy_loss(self._settings.loss, inputs)
        scale = inputs.token_scale(self._settings.loss, self._max_new_tokens)
        entropy = self._entropy(logits)
        metrics = {"loss/policy": policy.loss * scale, "policy/entropy": entropy, **policy.metrics}
        if update.critic_only:
            # The zero keeps a gradient (of zeros) on the trunk, which the engine expects.
            total = 0.0 * policy.loss
        else:
            total = policy.loss - self._settings.entropy_coefficient * entropy
            if self._settings.kl.apply_to == "loss":
                total = total + update.kl_coefficient * maths.kl_k2(current, old.reference)
            total = total * scale
        baseline = self._settings.advantage.critic_baseline
        if values is not None and baseline is not None:
            value = maths.value_loss(values, old.values, old.returns, baseline.value_clip)
            total = total + baseline.value_coefficient * value
            metrics["loss/value"] = value
        metrics["policy/approx_kl"] = maths.kl_k3(proximal, current)
        sums = {name: metric.detach().sum() for name, metric in metrics.items()}
        return MicroLoss(total.sum(), sums, maths.log_ratio(current.detach(), proximal))

    def _proximal(
        self, experience: Experience, micro: MicroBatch, current: Tensor, old: ExperienceTokens
    ) -> Tensor:
        """Log-probabilities at the start of the step; in its only update those of this pass."""
        if experience.policy_scored:
            return old.proximal
        if micro.counted:
            experience.proximal[experience.cells(micro.indices)] = current.detach().cpu()
        return current.detach()

    def _loss_inputs(
        self, current: Tensor, proximal: Tensor, old: ExperienceTokens, update: Update
    ) -> LossInputs:
        return LossInputs(
            current=current,
            proximal=proximal,
            behaviour=old.behaviour,
            importance_weight=maths.importance_weight(
                proximal, old.behaviour, self._settings.importance_cap
            ),
            importance_cap=self._settings.importance_cap,
            advantages=old.advantages,
            response=old.response,
            step_tokens=update.tokens,
            step_responses=len(update.indices),
        )

    def _entropy(self, logits: Tensor) -> Tensor:
        """[N]; tracked by autograd only if it is part of the loss."""
        with torch.set_grad_enabled(self._settings.entropy_coefficient > 0):
            return token_entropy(logits, self._temperature)
