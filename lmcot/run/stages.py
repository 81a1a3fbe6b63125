"""The stages that train: which policy each makes, and how its checkpoints are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lmcot import run_files
from lmcot.actors.resources.plan import Roles
from lmcot.config import Config, Stage
from lmcot.run.roles import distill_roles, refine_roles


@dataclass(frozen=True, slots=True)
class TrainingStage:
    """A stage that trains the small LM."""

    name: Stage
    policy: str
    """Name of the policy that it makes: its folder in the run, its name in rows and settings."""
    checkpoint_prefix: str
    roles: Callable[[Config], Roles]
    """Actors that it takes, with their settings."""


TRAINING_STAGES: Final = (
    TrainingStage("distill", run_files.DISTILLED, "distill-step-", distill_roles),
    TrainingStage("refine", run_files.REFINED, "step-", refine_roles),
)
"""In the order in which a run goes through them."""


def training_stage(name: Stage) -> TrainingStage:
    """The training stage of a name.

    Raises:
        LookupError: if no stage of that name trains.
    """
    for stage in TRAINING_STAGES:
        if stage.name == name:
            return stage
    raise LookupError(f"'{name}' is no stage that trains")
