"""What refinement starts from: its model, its first state and its actors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from lmcot.actors.resources.cluster import check_plan
from lmcot.config.stages import BASE
from lmcot.data.sampler import PromptSampler
from lmcot.evaluation.evaluate import check_evaluation
from lmcot.learner.plan import refine_plan
from lmcot.records import RunState
from lmcot.run.context import Run
from lmcot.run.first_answers import ask_first
from lmcot.run.policies import check_policy
from lmcot.run.roles import published_weights, refine_roles
from lmcot.training.learners import Learners
from lmcot.training.pipeline import Fleets
from lmcot.training.questions import check_enough, rows_of_steps

REFINE: Final = "refine"


@contextmanager
def started_actors(run: Run) -> Iterator[tuple[Fleets, Learners]]:
    """Starts the actors of refinement, and ends them in the end.

    All of them ask for resources before one waits, and load at the same time: where nodes have to
    join the cluster, they join together.

    Raises:
        UserError: before any actor starts, if something is missing or does not fit.
    """
    config = run.config
    source = start_source(run)
    check_enough(len(run.train), config.refine)
    if config.evaluate.during.every:
        check_evaluation(run)
    _ask_first(run)
    check_plan(REFINE, refine_roles(config), config.actors, published_weights(config))
    learners = Learners(run, refine_plan(config, source, config.refine.steps))
    with ExitStack() as stack:
        fleets = open_fleets(run, source, stack)
        if config.actors.colocate:
            learners.take_room_beside(fleets.rollout.placement)
        stack.enter_context(learners)
        fleets.wait_ready()
        learners.wait_ready()
        yield fleets, learners


def _ask_first(run: Run) -> None:
    """Has the frozen LM answer first what the steps ask, where the small LM advises."""
    if run.config.prompts.advises:
        ask_first(run, run.train, rows_of_steps(len(run.train), run.config))
        ask_first(run, run.validation, range(_evaluated(run)))


def _evaluated(run: Run) -> int:
    """Number of questions that are evaluated while refinement runs."""
    settings = run.config.evaluate.during
    return min(settings.questions, len(run.validation)) if settings.every else 0


def open_fleets(run: Run, source: str, stack: ExitStack, *, trains: bool = True) -> Fleets:
    """Starts the fleets that sample and judge, without waiting; the stack ends them.

    Args:
        source: model source that the rollout actors start from.
        trains: whether the learner will publish versions to them.
    """
    needs_frozen = run.config.rewards.kind == "guidance"
    frozen = stack.enter_context(run.frozen_fleet()) if needs_frozen else None
    rollout = stack.enter_context(run.rollout_fleet(source, trains=trains))
    reward = stack.enter_context(run.reward_fleet())
    return Fleets(rollout, reward, frozen, run.demonstrations)


def start_source(run: Run) -> str:
    """Model source that refinement starts from.

    Raises:
        UserError: if the policy that the settings name is not there yet.
    """
    policy = run.config.refine.start_from
    if policy == BASE:
        return run.config.policy.source
    check_policy(run.directory, run.config, policy, "to refine", "refine.start_from")
    return str(run.directory.policy(policy))


def fresh_state(run: Run) -> RunState:
    """The state before the first step of refinement."""
    return RunState(REFINE, sampler=PromptSampler(len(run.train), run.config.seed).state())
