"""Settings of distillation, PPO and the learner."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmcot.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)


class OptimiserSettings(Settings):
    """AdamW (DeepSpeed's) with linear warm-up and a constant or linear decay."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps of linear warm-up."""
    decay: Literal["constant", "linear"] = "constant"
    """What follows the warm-up: constant, or linear decay to 0 at the last step."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""


class DistillSettings(Settings):
    """Supervised training of the small LM on the teacher's rationales."""

    epochs: PositiveInt = 1
    """Passes over the kept rationales."""
    batch_size: PositiveInt = 8
    """Rationales in one optimiser step."""
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=3e-5)
    """Adam and its schedule."""


class FixedKl(Settings):
    """A constant KL coefficient."""

    kind: Literal["fixed"]
    coefficient: NonNegativeFloat = 0.05
    """Weight of the KL penalty per token."""


class AdaptiveKl(Settings):
    """The proportional controller of Ziegler et al. 2019, section 2.2."""

    kind: Literal["adaptive"]
    coefficient: PositiveFloat = 0.05
    """Initial weight of the KL penalty per token."""
    target: PositiveFloat = 6.0
    """KL per rationale (nats) that the controller steers to."""
    horizon: PositiveFloat = 10_000.0
    """Rationales over which it reacts."""


Kl = Annotated[FixedKl | AdaptiveKl, Field(discriminator="kind")]


class RefineSettings(Settings):
    """PPO on the frozen LM's rewards (Schulman et al. 2017)."""

    start_from: Literal["distilled", "base"] = "distilled"
    """The distilled policy, or the small LM as it came."""
    steps: PositiveInt = 100
    """PPO steps: each samples, judges and learns one batch."""
    prompts_per_step: PositiveInt = 16
    """Questions in one step."""
    samples_per_prompt: PositiveInt = 4
    """Rationales sampled for each question."""
    epochs: PositiveInt = 1
    """Passes over a step's batch."""
    minibatches: PositiveInt = 1
    """Optimiser steps in one pass."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's lambda (Schulman et al. 2016)."""
    clip: PositiveFloat = 0.2
    """The ratio is clipped to 1 - clip .. 1 + clip."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the loss for negative advantages, as a multiple of the advantage; unset: none."""
    value_clip: PositiveFloat = 0.2
    """New values are clipped to the old ones plus or minus this."""
    value_coefficient: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    kl: Kl = FixedKl(kind="fixed")
    """Controller of the KL penalty to the reference policy."""
    importance_cap: PositiveFloat = 2.0
    """Upper bound of the importance weight between the sampler's and the learner's arithmetic."""
    reward_clip: PositiveFloat = 10.0
    """Rewards are clipped to plus or minus this before the KL penalty is added."""
    length_penalty: NonNegativeFloat = 0.0
    """Taken from the reward of a rationale that was cut at the length limit."""
    target_kl: PositiveFloat | None = None
    """A pass ends early when the approximate KL to the step's first policy exceeds this."""
    critic_warmup_steps: NonNegativeInt = 0
    """First so many steps train the value head alone."""
    min_judged_share: Fraction = 0.5
    """If fewer of a step's rationales could be judged, the run stops with a checkpoint."""
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=1e-6, eps=1e-5)
    """Adam and its schedule."""

    @model_validator(mode="after")
    def _enough_rollouts(self) -> RefineSettings:
        rollouts = self.prompts_per_step * self.samples_per_prompt
        if self.minibatches > rollouts:
            raise ValueError(
                f"minibatches is {self.minibatches}, but a step has only {rollouts} rationales "
                "(prompts_per_step x samples_per_prompt): lower it"
            )
        return self


class LearnerSettings(Settings):
    """The DeepSpeed engine."""

    zero_stage: Literal[0, 1, 2] = 2
    """ZeRO stage: what is partitioned over the learners. 0 and 1 are for float32 only."""
    micro_batch_size: PositiveInt = 4
    """Sequences that go through the model at once; results do not depend on it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
