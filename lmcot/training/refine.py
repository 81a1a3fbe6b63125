"""Refinement: PPO on the rewards of the frozen LM. `_train` is the whole loop.

In each step the learners publish the policy, rollout actors sample rationales with it, reward
actors judge them with the frozen LM, and the learners take a PPO step on them. `Pipeline` samples
and judges in the background. `Learners.run_until_done` stands around the loop: it resumes the run,
and repeats the loop from the last checkpoint when a learner is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from lmcot import run_files
from lmcot.actors.learner_actor import StepMetrics
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.monitor.curves import plot_training
from lmcot.monitor.progress import Progress, say
from lmcot.records import RunState
from lmcot.run.budgets import usage_metrics
from lmcot.run.context import Run
from lmcot.run.inputs import check_functions, contents
from lmcot.run.model_card import write_model_card
from lmcot.training.batch import Batch
from lmcot.training.interim import InterimEvaluation
from lmcot.training.learners import Learners
from lmcot.training.pipeline import Fleets, Pipeline
from lmcot.training.sample_texts import show
from lmcot.training.start import REFINE, fresh_state, started_actors
from lmcot.training.step_metrics import mean_reward, step_metrics
from lmcot.training.step_timing import StepTimer

STAGE: Final = REFINE
OnStep = Callable[[int, dict[str, float]], None]


def refine(run: Run, *, on_step: OnStep = lambda step, metrics: None) -> None:
    """Refines up to ``refine.steps`` and writes ``refined/``; resumes a run that was interrupted.

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
    check_functions(run)
    with started_actors(run) as (fleets, learners):
        run.directory.begin(STAGE, contents(run, STAGE))
        learners.run_until_done(
            fresh=lambda: fresh_state(run),
            train=lambda state, bar: _train(run, fleets, learners, state, bar, on_step),
        )
    run.directory.finish(STAGE, steps=steps)
    for policy in (run_files.REFINED, run_files.BEST):
        write_model_card(run, policy)
    plot_training(run.monitor.metrics_path, run.directory.path / "refine.png", STAGE)


def _train(
    run: Run,
    fleets: Fleets,
    learners: Learners,
    state: RunState,
    bar: Progress,
    on_step: OnStep,
) -> None:
    """Takes all steps after ``state``, then exports the model."""
    steps, attention = run.config.refine.steps, ""
    interim = InterimEvaluation(run, fleets, learners, after=state.step)
    with Pipeline(run, fleets, learners, state, interim) as pipeline:
        timer = StepTimer(fleets, learners, pipeline)
        for step in range(state.step, steps):
            run.interruption.check()
            _publish_and_sample(learners, step, pipeline, interim)
            timer.mark("publish")

            batch = pipeline.take(step)  # waits until it is sampled and judged
            timer.mark("wait")

            if run.config.actors.colocate:
                fleets.rollout.tell(RolloutActor.rest)
            learned = _learn(learners, pipeline, batch, state)
            if learned.attention not in ("model", attention):
                attention = learned.attention
                say(f"{STAGE}: the learner's attention is by '{attention}' (learner.attention)")
            state.step, state.sampler = step + 1, batch.sampler
            state.kl_controller = learned.kl_controller
            state.reward_statistics = learned.reward_statistics

            columns = batch.columns
            run.monitor.rollouts(state.step, batch.records)
            show(run.monitor, state.step, STAGE, columns, batch.records)
            timer.mark("learn")
            metrics = {
                **step_metrics(columns, run.config.refine.samples_per_prompt),
                **batch.choice_metrics,
                **learned.values,
                **usage_metrics(batch.usage),
                **timer.metrics(batch, learned.tokens),
            }
            run.monitor.log(state.step, STAGE, metrics)
            bar.update(1, reward=mean_reward(columns), kl=learned.kl, **batch.shown)

            if state.step % run.config.checkpoints.every == 0 or state.step == steps:
                learners.checkpoint(state)
            on_step(state.step, metrics)
        _publish_and_sample(learners, steps, pipeline, interim)
        interim.finish(pipeline)
    learners.check_learned(filtered=run.config.refine.filter is not None)
    learners.export(run.directory.policy(run_files.REFINED), run.directory.critic)


def _learn(learners: Learners, pipeline: Pipeline, batch: Batch, state: RunState) -> StepMetrics:
    """Has a batch learnt; a batch of which every question is left out changes nothing."""
    if batch.learnt:
        return pipeline.work_until(learners.ppo_step(None, batch.step))
    say(
        f"refine: step {batch.step + 1} learns nothing: none of the {len(batch.asked)} questions "
        "that it asked is kept by refine.filter"
    )
    return StepMetrics(
        kl=math.nan,
        tokens=0.0,
        values={"batch/tokens": 0.0},
        kl_controller=state.kl_controller,
        reward_statistics=state.reward_statistics,
    )


def _publish_and_sample(
    learners: Learners, step: int, pipeline: Pipeline, interim: InterimEvaluation
) -> None:
    """Publishes the policy after ``step`` steps and has it sampled, if anything is due with it.

    Due are the batches that this version samples, and perhaps an evaluation. Does not wait for
    them.
    """
    evaluates = interim.due(step)
    if not evaluates and not pipeline.wants(step):
        return
    # The rollout actors load version 0 themselves.
    weights = pipeline.work_until(learners.publish(step)) if step else ()
    pipeline.sample(step, weights)
    if evaluates:
        interim.start(step, weights)
