"""The stages that train: `TRAINING_STAGES` says what each makes and needs, and everything asks it.

Settings of a stage are the section of its name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator, model_validator
from pydantic_core import PydanticKnownError

from lmcot import run_files
from lmcot.config.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)
from lmcot.config.signal import CurriculumSettings, SignalFilter
from lmcot.config.training import (
    Advantage,
    FixedKl,
    Gae,
    Kl,
    OptimiserSettings,
    PolicyLoss,
    PpoLoss,
)

if TYPE_CHECKING:
    from lmcot.storage import Place

Colour = Literal["grey", "orange", "ink", "purple", "blue", "green", "red", "teal"]
"""Colours of rows in pictures."""
BASE: Final = "base"
"""Name of the policy without training: the small LM of ``policy.source``."""


def _known_start(policy: str) -> str:
    earlier = takewhile(lambda stage: stage.name != "refine", TRAINING_STAGES)
    known = [*(stage.policy for stage in earlier), BASE]
    if policy not in known:
        *others, last = [f"'{one}'" for one in known]
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return policy


def _known_trained(policy: str) -> str:
    if policy not in TRAINED_POLICIES:
        *others, last = [f"'{one}'" for one in TRAINED_POLICIES]
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return policy


TrainedPolicy = Annotated[str, AfterValidator(_known_trained)]
"""Name of a policy that a stage makes."""
StartPolicy = Annotated[str, AfterValidator(_known_start)]
"""Name of a policy that refinement may start from."""


class RefineSettings(Settings):
    """PPO on the frozen LM's rewards (Schulman et al. 2017)."""

    start_from: StartPolicy = run_files.DISTILLED
    """Policy that PPO starts from: that of an earlier stage, or ``base``, the small LM
    without training."""
    steps: PositiveInt = 100
    """PPO steps: each samples, judges and learns one batch."""
    prompts_per_step: PositiveInt = 16
    """Questions in one step."""
    samples_per_prompt: PositiveInt = 4
    """Rationales sampled for each question."""
    max_staleness: NonNegativeInt = 0
    """How many updates the policy that samples a batch may lag behind the one that learns from it.
    0: sampling and learning take turns, and a run is exactly resumable; 1 or more: they overlap."""
    filter: SignalFilter | None = None
    """Questions whose rationales all measure the same are left out, and others asked in their
    place; unset: each step learns from all that it asked."""
    curriculum: CurriculumSettings | None = None
    """Questions that were solved, or never solved, in their last tries rest; unset: each question
    is asked once in every epoch."""
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

    @model_validator(mode="after")
    def _filter_fits_the_advantages(self) -> RefineSettings:
        if self.filter is not None and not self.advantage.needs_group:
            raise ValueError(
                "filter leaves out questions whose rationales all measure the same, but "
                f"advantage.kind '{self.advantage.kind}' learns from these too, since it does not "
                "compare a question's rationales with each other: leave filter out, or set "
                "advantage.kind to 'grpo' or 'rloo'"
            )
        return self

    @model_validator(mode="after")
    def _loss_fits_the_advantages(self) -> RefineSettings:
        loss, advantage = self.loss, self.advantage
        if loss.needs_same_advantage and not advantage.same_for_all_tokens:
            raise ValueError(
                f"loss.kind '{loss.kind}' has one ratio for a whole rationale, but advantage.kind "
                f"'{advantage.kind}' gives each token an advantage of its own: set advantage.kind "
                "to 'grpo' or 'rloo', or loss.kind to 'ppo' or 'cispo'"
            )
        return self


@dataclass(frozen=True, slots=True)
class TrainingStage:
    """A stage that trains the small LM."""

    name: str
    """Its command, its section of the settings, and what its metrics are logged under."""
    summary: str
    """What it does, for people: ``lmcot --help``."""
    policy: str
    """Name of the policy that it makes: its folder in the run, its name in rows and settings."""
    checkpoint_prefix: str
    """What the names of its checkpoints begin with."""
    reads_rationales: bool = False
    """Whether it learns the teacher's rationales, and so depends on what annotation depends on."""
    judges: bool = False
    """Whether the settings' rewards judge rationales that it samples."""
    evaluates: bool = False
    """Whether ``evaluate.during`` evaluates its policy while it trains."""
    extends: bool = False
    """Whether more steps may be asked of it when it is finished."""
    gathers: str = ""
    """File or folder of what it makes before it trains, if it has one."""
    small_lm: str = ""
    """Its policy in words, for reports; empty: `policy_in_words` names the stage."""
    colour: Colour = "teal"
    """Of its policy's rows in pictures."""
    round: int = 0
    """Which of its rounds this is, from 1, if it trains in rounds; 0: the stage as a whole."""

    def of_round(self, number: int) -> TrainingStage:
        """The training of one round, with a policy and checkpoints of its own."""
        name = f"{self.name}-{number}"
        return replace(
            self,
            round=number,
            policy=f"{run_files.CHECKPOINTS}/{name}",
            checkpoint_prefix=f"{name}-step-",
        )

    @property
    def training(self) -> str:
        """What the metrics of its training are logged under, and its end is recorded under."""
        return f"{self.name}-{self.round}" if self.round else self.name

    @property
    def policy_in_words(self) -> str:
        """Its policy in words."""
        return self.small_lm or f"the small LM after {self.name}"


TRAINING_STAGES: Final = (
    TrainingStage(
        "distill",
        "train the small LM on the kept rationales",
        run_files.DISTILLED,
        "distill-step-",
        reads_rationales=True,
        small_lm="the distilled small LM",
        colour="purple",
    ),
    TrainingStage(
        "reject",
        "train the small LM on the best right ones of its own rationales",
        run_files.REJECTION,
        "reject-step-",
        reads_rationales=True,
        judges=True,
        extends=True,
        gathers=run_files.REJECTION_ROUNDS,
        small_lm="the small LM after rejection sampling",
    ),
    TrainingStage(
        "refine",
        "refine the small LM by PPO on the frozen LM's rewards",
        run_files.REFINED,
        "step-",
        judges=True,
        evaluates=True,
        extends=True,
        small_lm="the small LM after PPO",
        colour="blue",
    ),
)
"""In the order in which a run goes through them, so that a later one's policy is more trained."""
TRAINED_POLICIES: Final = tuple(stage.policy for stage in TRAINING_STAGES)
"""Folders of the policies that the stages train, least trained first."""
LEARNERS_FOLDERS: Final = frozenset(
    {run_files.CHECKPOINTS, *TRAINED_POLICIES, run_files.BEST, run_files.CRITIC}
)
"""Folders that learners write, wherever they run; the driver writes everything else."""


POLICIES: Final = (*reversed(TRAINED_POLICIES), run_files.BEST, BASE)
"""Names of all policies that may be asked for, the most trained first."""


def training_stage(name: str) -> TrainingStage:
    """The training stage of a name.

    Raises:
        LookupError: if no stage of that name trains.
    """
    for stage in TRAINING_STAGES:
        if stage.name == name:
            return stage
    raise LookupError(f"no training stage is called '{name}'")


def stage_of_policy(policy: str) -> TrainingStage:
    """The stage that makes a policy.

    Raises:
        LookupError: if no stage makes it.
    """
    for stage in TRAINING_STAGES:
        if stage.policy == policy:
            return stage
    raise LookupError(f"no training stage makes the policy '{policy}'")


def most_trained(run: Place) -> str | None:
    """Name of the most trained policy that a run directory holds; None if it holds none."""
    for policy in reversed(TRAINED_POLICIES):
        if run_files.holds_model(run / policy):
            return policy
    return None
