"""How the learner learns: optimiser, KL penalty, advantages, losses and its engine."""

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
