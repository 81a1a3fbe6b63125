"""What learners are started for."""

from __future__ import annotations

from dataclasses import dataclass

from lmcot.config import Config, OptimiserSettings, RefineSettings
from lmcot.ownership import Claim


@dataclass(frozen=True, slots=True)
class LearnerPlan:
    """What the learners of a stage train, and how."""

    stage: str
    source: str
    """Model source that the stage starts from; in PPO it is the reference too."""
    total_steps: int
    """Steps of the stage, for the learning rate's schedule."""
    optimiser: OptimiserSettings
    ppo: RefineSettings | None = None
    """Settings of PPO, which takes a reference and, if its advantages need one, a critic; None if
    the stage trains on rationales that it is given."""
    checkpoint_prefix: str = ""
    """What the names of its checkpoints begin with, if not as the stage's begin."""
    claim: Claim | None = None
    """The claim to the run that they write for, which they check first; None outside of a run."""


def distill_plan(config: Config, source: str, total_steps: int) -> LearnerPlan:
    """Distillation from a model source."""
    return LearnerPlan("distill", source, total_steps, config.distill.optimiser)


def refine_plan(config: Config, source: str, total_steps: int) -> LearnerPlan:
    """PPO from a model source."""
    refine = config.refine
    return LearnerPlan("refine", source, total_steps, refine.optimiser, ppo=refine)
