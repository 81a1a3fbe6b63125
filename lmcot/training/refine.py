"""Refinement: PPO on the frozen LM's rewards. The loop is `_finish`, one turn of it `_learn`.

Sampling, judging and learning meet in the `Pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np

from lmcot.actors.learner_actor import LearnerPlan
from lmcot.actors.learner_group import LearnerLost
from lmcot.actors.resources.cluster import check_plan
from lmcot.data.sampler import PromptSampler
from lmcot.errors import Interrupted, UserError
from lmcot.evaluation.evaluate import check_evaluation
from lmcot.monitor.curves import plot_training
from lmcot.monitor.progress import Progress, progress, say
from lmcot.records import Columns, Failure, RunState
from lmcot.run.budgets import usage_metrics
from lmcot.run.context import Run
from lmcot.run.inputs import contents
from lmcot.run.roles import published_weights, refine_roles
from lmcot.run.versions import versions
from lmcot.training import interim as during
from lmcot.training.interim import DuringTraining
from lmcot.training.learners import Learners
from lmcot.training.pipeline import Batch, Fleets, Pipeline
from lmcot.training.sample_texts import show
from lmcot.training.step_metrics import step_metrics
from lmcot.training.step_timing import Meter

STAGE: Final = "refine"


@dataclass(frozen=True, slots=True)
class Crew:
    """The actors of this stage."""

    fleets: Fleets
    learners: Learners
    during: DuringTraining


def refine(
    run: Run, *, on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
) -> None:
    """Refines up to ``refine.steps`` and writes ``refined/``; goes on where it was left.

    Args:
        on_step: told each step's number (from 1) and metrics.

    Raises:
        UserError: if there is no distilled model to start from, or too few rationales could be
            judged (after a checkpoint).
    """
    steps = run.config.refine.steps
    finished = run.directory.finished(STAGE)
    if finished and finished["steps"] >= steps:
        say(f"refine: done already, {finished['steps']} steps")
        return
    with ExitStack() as stack:
        crew = _start(run, stack)
        run.directory.begin(STAGE, contents(run, STAGE))
        state = _resume(run, crew.learners.resume())
        try:
            with progress(STAGE, total=steps, done=state.step) as bar:
                while True:
                    pipeline = Pipeline(run, crew.fleets, crew.learners, state, crew.during)
                    try:
                        _finish(run, crew, state, pipeline, bar, on_step)
                        break
                    except LearnerLost as lost:
                        pipeline.abandon()
                        state = _resume(run, crew.learners.recover(lost))
                        bar.move_to(state.step)
        except (Interrupted, UserError):
            crew.learners.save(state)
            raise
    run.directory.finish(STAGE, steps=steps)
    plot_training(run.monitor.metrics_path, run.directory.path / "refine.png", STAGE)


def _finish(
    run: Run,
    crew: Crew,
    state: RunState,
    pipeline: Pipeline,
    bar: Progress,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """All steps that are left, then the export."""
    steps = run.config.refine.steps
    meter = Meter(crew.fleets, crew.learners, pipeline)
    while state.step < steps:
        run.interruption.check()
        _put_to_work(crew, state, pipeline)
        meter.mark("publish")
        batch = pipeline.take(state.step)
        meter.mark("wait")
        metrics = _learn(run, crew, state, pipeline, batch)
        meter.mark("learn")
        state.units_in_flight = pipeline.units_in_flight()
        metrics |= meter.metrics(batch, metrics)
        run.monitor.log(state.step, STAGE, metrics)
        bar.update(1, reward=metrics["reward/mean"], kl=metrics["kl"])
        if state.step % run.config.checkpoints.every == 0 or state.step == steps:
            crew.learners.begin_save(state)
        on_step(state.step, metrics)
    _put_to_work(crew, state, pipeline)
    crew.during.finish(pipeline)
    crew.learners.check_learned()
    crew.learners.export(run.directory.refined, run.directory.critic)


def _put_to_work(crew: Crew, state: RunState, pipeline: Pipeline) -> None:
    """Sets the rollout actors to work with the learners' present policy, where there is work."""
    version = state.policy_version
    samples, evaluates = pipeline.wants(version), crew.during.due(state.step)
    if not samples and not evaluates:
        return
    weights = []
    if version:  # the actors load version 0 themselves
        weights = pipeline.work_until(crew.learners.begin("publish", version=version)).result()[0]
    if samples:
        pipeline.open(version, weights)
        state.units_in_flight = pipeline.units_in_flight()
    if evaluates:
        crew.during.start(state.step, version, weights)


def _learn(
    run: Run, crew: Crew, state: RunState, pipeline: Pipeline, batch: Batch
) -> dict[str, float]:
    """One PPO step on a batch, while the others work on the next ones.

    ``state`` advances with the learners: what may be interrupted comes before.
    """
    columns = batch.columns
    check_staleness(columns, state.policy_version, run.config.refine.max_staleness)
    check_judged(columns, batch.failures)
    crew.learners.finish_save()  # begun after the last step, and done by now
    pending = crew.learners.begin("ppo_step", scored=batch.scored, step=batch.step)
    learned = crew.learners.learned(pipeline.work_until(pending))
    state.kl_controller, state.reward_statistics = crew.learners.call("controllers")[0]
    state.step += 1
    state.policy_version = state.step
    state.sampler = batch.sampler
    run.monitor.rollouts(state.step, batch.records)
    show(run.monitor, state.step, STAGE, columns, batch.records)
    return {**step_metrics(columns), **learned, **usage_metrics(batch.usage)}


def check_staleness(columns: Columns, version: int, limit: int) -> None:
    """Refuses what a policy too old has sampled.

    Raises:
        RuntimeError: naming that version.
    """
    for sampled_by in np.unique(columns["policy_version"]):
        if not 0 <= version - sampled_by <= limit:
            raise RuntimeError(
                f"a rationale was sampled by policy version {sampled_by:.0f}, but version "
                f"{version} admits only those of the last {limit} versions and its own "
                "(refine.max_staleness)"
            )


def check_judged(columns: Columns, failures: Sequence[Failure]) -> None:
    """Refuses a batch that nothing can be learnt from, whatever the budgets for failures say.

    Raises:
        UserError: naming the first failure.
    """
    if not columns["judged"].any():
        raise UserError(
            f"none of a step's {len(columns['judged'])} rationales could be judged; the first "
            f"failure: {failures[0].reason}; fix that and run the same command again"
        )


def _start(run: Run, stack: ExitStack) -> Crew:
    """Starts the actors; all of them load at the same time.

    All ask for room before one waits for it: where nodes join, they join together.
    """
    config = run.config
    source = start_source(run)
    if config.evaluate.during.every:
        check_evaluation(run)
    check_plan(STAGE, refine_roles(config), config.actors, published_weights(config))
    learners = Learners(run, LearnerPlan(STAGE, source, config.refine.steps))
    fleets = open_fleets(run, source, stack)
    stack.enter_context(learners)
    fleets.wait_ready()
    learners.wait_ready()
    return Crew(fleets, learners, DuringTraining(run, fleets, learners))


def open_fleets(run: Run, source: str, stack: ExitStack) -> Fleets:
    """Asks for the fleets that sample and judge, and waits for nothing; they end with the stack.

    Args:
        source: model source that the rollout actors start from.
    """
    needs_frozen = run.config.rewards.kind == "guidance"
    frozen = stack.enter_context(run.frozen_fleet()) if needs_frozen else None
    rollout = stack.enter_context(run.rollout_fleet(source, trains=True))
    reward = stack.enter_context(run.reward_fleet())
    return Fleets(rollout, reward, frozen)


def start_source(run: Run) -> str:
    """Model source that refinement starts from.

    Raises:
        UserError: if there is no distilled model, and there should be one.
    """
    if run.config.refine.start_from == "base":
        return run.config.policy.source
    if not run.directory.finished("distill"):
        raise UserError(
            f"there is no distilled model in '{run.directory.home}' to refine: run 'lmcot distill' "
            "on this run directory first, or set refine.start_from to 'base'"
        )
    return str(run.directory.distilled)


def fresh_state(run: Run) -> RunState:
    """Before the first step."""
    sampler = PromptSampler(len(run.train), run.config.seed)
    return RunState(
        STAGE, sampler=sampler.state(), seeds={"run": run.config.seed}, versions=versions()
    )


def _resume(run: Run, found: RunState | None) -> RunState:
    """The state to go on from: a checkpoint's, or a fresh one."""
    state = found or fresh_state(run)
    if found is not None:
        again = len(state.units_in_flight)
        more = f"; {again} units that were in flight then are asked again" if again else ""
        say(f"refine: goes on after step {state.step}{more}")
    run.monitor.truncate(STAGE, state.step)
    during.truncate(run, state.step)
    return state
