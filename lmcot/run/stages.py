"""The stages that train, with the policy that each makes and the name of its checkpoints."""

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
    """Name of the policy that it makes, in the run's folder, in rows and in settings."""
    checkpoint_prefix: str
    roles: Callable[[Config], Roles]
    """The actors that it needs, with their settings."""


TRAINING_STAGES: Final = (
    TrainingStage("distill", run_files.DISTILLED, "distill-step-", distill_roles),
    TrainingStage("refine", run_files.REFINED, "step-", refine_roles),
)
"""The training stages, in the order in which a run goes through them."""


def training_stage(name: Stage) -> TrainingStage:
    """The training stage with a name.

    Raises:
        LookupError: if no stage of that name trains.
    """
    for stage in TRAINING_STAGES:
        if stage.name == name:
            return stage
    raise LookupError(f"'{name}' is not a stage that trains")
