"""Settings of distillation, PPO and the learner."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

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
    """AdamW (torch's) with linear warm-up and a constant or linear decay."""

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
    apply_to: Literal["reward", "loss"] = "reward"
    """``reward``: k1 is taken from the rewards; ``loss``: k2 is added to the loss."""


class AdaptiveKl(Settings):
    """The proportional controller of Ziegler et al. 2019, section 2.2."""

    kind: Literal["adaptive"]
    coefficient: PositiveFloat = 0.05
    """Initial weight of the KL penalty per token."""
    target: PositiveFloat = 6.0
    """KL per rationale (nats) that the controller steers to."""
    horizon: PositiveFloat = 10_000.0
    """Number of rationales over which the controller reacts."""
    apply_to: Literal["reward", "loss"] = "reward"
    """``reward``: k1 is taken from the rewards; ``loss``: k2 is added to the loss."""


Kl = Annotated[FixedKl | AdaptiveKl, Field(discriminator="kind")]


class HeadCritic(Settings):
    """A value head on the policy's own trunk."""

    kind: Literal["head"] = "head"
    own_trunk: ClassVar[bool] = False
    source: ClassVar[None] = None
    learning_rate: PositiveFloat | None = None
    """Learning rate of the head; unset: ``optimiser.learning_rate``."""


class ModelCritic(Settings):
    """A language model of its own, with a value in place of the vocabulary."""

    kind: Literal["model"]
    own_trunk: ClassVar[bool] = True
    source: str | None = None
    """Where its trunk comes from, in the same forms as ``policy.source``; it must read the
    policy's token ids. Unset: the weights that the policy starts from."""
    learning_rate: PositiveFloat | None = None
    """Learning rate of the critic; unset: ``optimiser.learning_rate``."""


Critic = Annotated[HeadCritic | ModelCritic, Field(discriminator="kind")]


class AdvantageSettings(Settings):
    """What every advantage estimator tells the rest of the learner about itself."""

    kind: str
    """The estimator's name."""
    needs_group: ClassVar[bool] = False
    """Whether a rationale is compared with other rationales for the same question."""

    @property
    def critic_baseline(self) -> CriticBaseline | None:
        """How the critic is trained; None for an estimator without a critic."""
        return None

    @property
    def needs_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return self.critic_baseline is not None


class CriticBaseline(AdvantageSettings):
    """An estimator whose baseline is a critic's value of each state."""

    critic: Critic = HeadCritic()
    """What estimates the value of a state."""
    value_clip: PositiveFloat = 0.2
    """New values are clipped to the old ones plus or minus this."""
    value_coefficient: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    critic_warmup_steps: NonNegativeInt = 0
    """Number of initial steps that train only the critic."""

    @property
    def critic_baseline(self) -> CriticBaseline:
        """These settings."""
        return self


class GroupBaseline(AdvantageSettings):
    """An estimator whose baseline is the rewards of the question's other rationales."""

    needs_group: ClassVar[bool] = True


class Gae(CriticBaseline):
    """Generalised advantage estimation with a critic (Schulman et al. 2016): the paper's PPO."""

    kind: Literal["gae"] = "gae"
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's lambda."""


class Rloo(GroupBaseline):
    """Leave-one-out baseline over a question's rationales (Ahmadian et al. 2024)."""

    kind: Literal["rloo"]


class Grpo(GroupBaseline):
    """Baseline of a question's mean reward (Shao et al. 2024)."""

    kind: Literal["grpo"]
    normalise: bool = True
    """Divide by the standard deviation within the question (the paper's); off: Dr. GRPO's."""


Advantage = Annotated[Gae | Rloo | Grpo, Field(discriminator="kind")]


class PpoLoss(Settings):
    """PPO's clipped loss (Schulman et al. 2017)."""

    kind: Literal["ppo"] = "ppo"
    clip: PositiveFloat = 0.2
    """The ratio is clipped to 1 - clip .. 1 + clip."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the loss for negative advantages, as a multiple of the advantage; unset: none."""


PolicyLoss = PpoLoss
"""Settings of the policy's loss. With a second kind: ``Annotated[PpoLoss | Other,
Field(discriminator="kind")]``."""


class RefineSettings(Settings):
    """PPO on the frozen LM's rewards (Schulman et al. 2017)."""

    start_from: Literal["distilled", "base"] = "distilled"
    """The distilled policy, or the small LM without distillation."""
    steps: PositiveInt = 100
    """PPO steps: each samples, judges and learns one batch."""
    prompts_per_step: PositiveInt = 16
    """Questions in one step."""
    samples_per_prompt: PositiveInt = 4
    """Rationales sampled for each question."""
    max_staleness: NonNegativeInt = 0
    """How many updates the policy that samples a batch may lag behind the one that learns from it.
    0: sampling and learning take turns, and a run is exactly resumable; 1 or more: they overlap."""
    epochs: PositiveInt = 1
    """Passes over a step's batch."""
    minibatches: PositiveInt = 1
    """Optimiser steps in one pass."""
    advantage: Advantage = Gae()
    """How much better a token was than expected: GAE with a critic, or a group baseline."""
    loss: PolicyLoss = PpoLoss()
    """What makes the policy follow the advantages."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    kl: Kl = FixedKl(kind="fixed")
    """KL penalty to the reference policy."""
    importance_cap: PositiveFloat = 2.0
    """Upper bound of the importance weight between the sampler's and the learner's arithmetic."""
    reward_clip: PositiveFloat = 10.0
    """Rewards are clipped to plus or minus this before the KL penalty is added."""
    scale_rewards: bool = False
    """Divide rewards by their standard deviation over the run so far, before they are clipped."""
    target_kl: PositiveFloat | None = None
    """A step's updates stop early once a minibatch's approximate KL to the policy at the start of
    the step exceeds this."""
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
        if self.advantage.needs_group and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage.kind '{self.advantage.kind}' compares a question's rationales with "
                f"each other, but samples_per_prompt is {self.samples_per_prompt}: set it to 2 "
                "or more, or advantage.kind to 'gae'"
            )
        return self


class LearnerSettings(Settings):
    """The DeepSpeed engine, and how a batch is cut for it; results do not depend on these."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: what is partitioned over the learners; 0: nothing, 1: the optimiser's state, 2:
    the gradients too, 3: the parameters too."""
    offload: Literal["none", "optimiser", "optimiser_and_parameters"] = "none"
    """What is kept in host memory instead of the GPU's: the optimiser (stage 1 or higher), and the
    parameters (stage 3)."""
    offload_reference: bool = False
    """Keep the reference model in host memory while it does not score."""
    tokens_per_micro_batch: PositiveInt = 2048
    """Tokens (padding included) that go through the model at once, per learner."""
    share_prompts: bool = True
    """A question's rationales go through the model as one row behind one prompt, where its
    architecture allows."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    max_skipped_updates: NonNegativeInt = 5
    """Updates whose loss or gradient is not finite are skipped; the run stops after more than this
    many in a row."""

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> LearnerSettings:
        least = {"none": 0, "optimiser": 1, "optimiser_and_parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload is '{self.offload}', which needs zero_stage {least} or more, but "
                f"zero_stage is {self.zero_stage}"
            )
        return self
