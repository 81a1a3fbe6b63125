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
    """AdamW (torch's), and the schedule of its learning rate."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps of linear warm-up, whose rates rise by equal parts to the peak: with 3, the
    first has a quarter of it, and the step after them all of it."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: the peak to the end, or a fall that reaches 0 after the last step,
    along a line or half a cosine."""
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
    same_for_all_tokens: ClassVar[bool] = False
    """Whether all tokens of a rationale have the same advantage."""

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
    same_for_all_tokens: ClassVar[bool] = True


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


class ReinforcePlusPlus(AdvantageSettings):
    """REINFORCE++ (Hu 2025, arXiv 2501.03262): no critic and no groups.

    A token's advantage is the discounted sum of the rewards from it on (the KL penalty at each
    token, the score at the last), less the mean and over the standard deviation of these sums over
    all tokens of the step. The paper's has ``gamma`` 1 and ``kl.apply_to: reward``.
    """

    kind: Literal["reinforce++"]
    gamma: Fraction = 1.0
    """Discount per token."""


Advantage = Annotated[Gae | Rloo | Grpo | ReinforcePlusPlus, Field(discriminator="kind")]


Aggregation = Literal["token_mean", "sequence_mean", "constant"]
ClipLow = Annotated[float, Field(gt=0, le=1)]
"""Distance of a ratio's lower bound from 1."""


class PolicyLossSettings(Settings):
    """What every policy loss has: how the losses of tokens become one number."""

    kind: str
    """The loss's name."""
    needs_same_advantage: ClassVar[bool] = False
    """Whether all tokens of a rationale must have the same advantage."""
    follows_advantages_only: ClassVar[bool] = False
    """Whether a rationale whose advantages are all 0 adds nothing to the gradient; the learner may
    then spare its backward pass."""

    aggregation: Aggregation = "token_mean"
    """How the losses of an optimiser step's tokens are averaged. ``token_mean``: the mean over all
    tokens (DAPO, arXiv 2503.14476). ``sequence_mean``: the mean over the tokens of each rationale,
    then over rationales (GRPO, arXiv 2402.03300). ``constant``: the sum over a rationale's tokens,
    divided by ``aggregation_length``, then the mean over rationales (Dr. GRPO, Liu et al. 2025,
    arXiv 2503.20783). It holds for the policy's loss, the entropy bonus and the KL penalty in the
    loss; a critic's loss is always a mean over tokens."""
    aggregation_length: PositiveInt | None = None
    """Number of tokens that ``aggregation: constant`` divides by; unset:
    ``policy.max_new_tokens``."""

    @model_validator(mode="after")
    def _length_is_used(self) -> PolicyLossSettings:
        if self.aggregation_length is not None and self.aggregation != "constant":
            raise ValueError(
                f"aggregation_length is {self.aggregation_length}, but aggregation is "
                f"'{self.aggregation}', which does not use it: leave it out, or set aggregation to "
                "'constant'"
            )
        return self


class PpoLoss(PolicyLossSettings):
    """PPO's clipped loss (Schulman et al. 2017), with bounds for each side (DAPO: Yu et al. 2025,
    arXiv 2503.14476).

    For the ratio r of a token's new probability to that at the start of the step, and its advantage
    A: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), times the importance weight between the
    sampler and the learner.
    """

    follows_advantages_only: ClassVar[bool] = True

    kind: Literal["ppo"] = "ppo"
    clip: PositiveFloat = 0.2
    """Value of ``clip_low`` and ``clip_high`` where they are not set."""
    clip_low: ClipLow | None = None
    """The ratio is clipped to 1 - clip_low or more; unset: ``clip``."""
    clip_high: PositiveFloat | None = None
    """The ratio is clipped to 1 + clip_high or less; unset: ``clip``. DAPO's is 0.28, with 0.2
    below."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the loss for negative advantages, as a multiple of the advantage, before the
    importance weight (Ye et al. 2020, arXiv 1912.09729); unset: none."""

    @property
    def bounds(self) -> tuple[float, float]:
        """``clip_low`` and ``clip_high``, or ``clip`` in their place."""
        low = self.clip if self.clip_low is None else self.clip_low
        return low, self.clip if self.clip_high is None else self.clip_high


class GspoLoss(PolicyLossSettings):
    """GSPO: PPO's clipped loss with one ratio for a whole rationale (Zheng et al. 2025, arXiv
    2507.18071, equations 5 to 7).

    The ratio is the geometric mean of the ratios of the rationale's tokens, exp(mean of log r). The
    importance weight between the sampler and the learner is the rationale's geometric mean, too.
    """

    needs_same_advantage: ClassVar[bool] = True
    follows_advantages_only: ClassVar[bool] = True

    kind: Literal["gspo"]
    clip_low: ClipLow = 3e-4
    """The ratio is clipped to 1 - clip_low or more."""
    clip_high: PositiveFloat = 4e-4
    """The ratio is clipped to 1 + clip_high or less."""
    aggregation: Aggregation = "sequence_mean"
    """As for the other losses, but the default is the paper's, in which each rationale counts
    equally; the others weigh a rationale by its length."""


class CispoLoss(PolicyLossSettings):
    """CISPO: the score-function gradient, weighted by the clipped ratio (MiniMax-M1, arXiv
    2506.13585, equations 4 and 5).

    For the ratio r of a token's new probability p to that at the start of the step, and its
    advantage A: -clip(r, 1 - clip_low, 1 + clip_high) A log p, where no gradient goes through the
    ratio; times the importance weight between the sampler and the learner. No token loses its
    gradient.
    """

    follows_advantages_only: ClassVar[bool] = True

    kind: Literal["cispo"]
    clip_low: ClipLow | None = None
    """The ratio is clipped to 1 - clip_low or more; unset: no lower bound, as in the paper."""
    clip_high: PositiveFloat = 4.0
    """The ratio is clipped to 1 + clip_high or less. The paper tuned this bound and names no value,
    and other implementations differ: verl's example has 0.2, Trinity-RFT 0.28, and settings for TRL
    bound the ratio by 5 or 8. The default bounds it by 5; docs/learner.md was measured with it."""


PolicyLoss = Annotated[PpoLoss | GspoLoss | CispoLoss, Field(discriminator="kind")]
"""Settings of the policy's loss."""


Kernel = Literal["model", "fused", "products"]
"""How attention is computed where rationales share their prompt: as the model does it by itself, or
in two parts by torch's fused kernel, with the gradient by that kernel or by matrix products."""


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
    attention: Literal["auto"] | Kernel = "auto"
    """Kernel for attention where a question's rationales share their prompt. ``model``: the model's
    own, over whole rows. ``fused``: torch's fused kernel, separately over the prompts, which need
    no mask, and over the rest. ``products``: the same, with the gradient by matrix products, which
    suits bfloat16 on processors with matrix units. ``auto``: the fastest of the three on this
    machine, tried before the first step of ``refine`` and remembered in lmcot's cache; in other
    stages, on a GPU, for a model of fewer than 10 million parameters or with
    ``gradient_checkpointing`` it is ``model``. A stage that resumes uses the kernel of its
    checkpoint. The kernels' results differ by rounding."""
    compile: bool = False
    """Compile what lies between attention (projections, activations, norms) with `torch.compile`,
    which fuses their element-wise operators: the first step takes a minute or more longer, later
    ones less. Results differ by rounding. It needs a C++ compiler, or Triton on a GPU, and does not
    work with ZeRO stage 3."""
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

    @model_validator(mode="after")
    def _whole_parameters_are_compiled(self) -> LearnerSettings:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile is on, which does not work with zero_stage 3, whose parameters are "
                "gathered layer by layer: turn it off, or set zero_stage to 2 or less"
            )
        return self

    @model_validator(mode="after")
    def _attention_is_computed_once(self) -> LearnerSettings:
        if self.gradient_checkpointing and self.attention in ("fused", "products"):
            raise ValueError(
                f"attention is '{self.attention}', which does not work with "
                "gradient_checkpointing: set attention to 'auto' or 'model'"
            )
        return self
