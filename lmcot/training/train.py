"""The stages of a run, one after the other; each skips what is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lmcot.actors.resources.plan import Published, Roles
from lmcot.config import Config
from lmcot.config.stages import BASE, TRAINING_STAGES
from lmcot.evaluation.evaluate import check_evaluation, evaluate
from lmcot.evaluation.rows import chosen_rows
from lmcot.evaluation.store import policy_sources
from lmcot.run.context import Run
from lmcot.run.roles import (
    annotate_roles,
    distill_roles,
    evaluate_roles,
    judging_roles,
    published_weights,
    refine_roles,
)
from lmcot.training.annotate import annotate
from lmcot.training.distill import distill
from lmcot.training.refine import refine
from lmcot.training.reject import reject


@dataclass(frozen=True, slots=True)
class RunStage:
    """A stage as it is run. What it trains, if it trains, says `lmcot.config.stages`."""

    name: str
    run: Callable[..., object]
    """Does what is left of it; takes the run, and what its command takes besides."""
    roles: Callable[[Config], Roles]
    """Actors that it takes, with their settings."""
    wanted: Callable[[Config], bool]
    """Whether `train` goes through it."""
    published: Callable[[Config], Published | None] = lambda config: None
    """Weights of which it holds several versions in the object stores."""


STAGES: Final = (
    RunStage("annotate", annotate, annotate_roles, lambda config: config.teacher is not None),
    RunStage("distill", distill, distill_roles, lambda config: config.teacher is not None),
    RunStage("reject", reject, judging_roles, lambda config: config.reject is not None),
    RunStage("refine", refine, refine_roles, lambda config: True, published_weights),
    RunStage(
        "evaluate",
        evaluate,
        lambda config: evaluate_roles(config, config.evaluate.rows),
        lambda config: config.frozen is not None,
    ),
)
"""In the order in which a run goes through them."""


def train(run: Run) -> None:
    """Goes through all stages that the settings want: annotates, distils, refines and evaluates.

    Raises:
        UserError: before any of them, if the evaluation at the end is not possible.
    """
    if run.config.frozen is not None:
        check_evaluation(run)
        chosen_rows(run.config.evaluate, policies_in_the_end(run))
    for stage in wanted_stages(run.config):
        stage.run(run)


def policies_in_the_end(run: Run) -> list[str]:
    """The policies that a run has or that `train` makes, least trained first."""
    there, stages = policy_sources(run), {stage.name for stage in wanted_stages(run.config)}
    trained = [one.policy for one in TRAINING_STAGES if one.policy in there or one.name in stages]
    return [BASE, *trained]


def wanted_stages(config: Config) -> list[RunStage]:
    """The stages that `train` goes through with these settings."""
    return [stage for stage in STAGES if stage.wanted(config)]
