"""Supervised training of the small LM on rationales, as distillation and its like do it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lmcot.config import DistillSettings, TrainingStage
from lmcot.data.sampler import PromptSampler
from lmcot.learner.plan import LearnerPlan
from lmcot.monitor.curves import plot_training
from lmcot.monitor.progress import Progress, say
from lmcot.records import RunState
from lmcot.run.context import Run
from lmcot.run.inputs import contents
from lmcot.run.model_card import write_model_card
from lmcot.run_files import training_picture
from lmcot.training.learners import Learners
from lmcot.training.pairs import TrainingPair, answers_of, batch_sizes, keep_out
from lmcot.training.validation import Validation


@dataclass(frozen=True, slots=True)
class _Course:
    """What a training goes through: its pairs, and the number of them in each optimiser step."""

    run: Run
    stage: TrainingStage
    pairs: Sequence[TrainingPair]
    sizes: Sequence[int]
    answer_weight: float
    validation: Validation | None


def train_on(
    run: Run,
    stage: TrainingStage,
    settings: DistillSettings,
    source: str,
    pairs: Sequence[TrainingPair],
) -> None:
    """Trains a stage's policy on prompts and rationales, from a model source; resumes that.

    The caller has checked that the stage is not finished, and that its actors fit.

    Raises:
        UserError: before any actor starts, if the settings leave nothing to train or validate on.
    """
    seed = run.config.seed
    learnt, kept_out = keep_out(pairs, settings.validation, stage.name, seed)
    sizes = batch_sizes(learnt, settings, stage.name, seed)
    plan = LearnerPlan(
        stage.training,
        source,
        len(sizes),
        settings.optimiser,
        checkpoint_prefix=stage.checkpoint_prefix,
    )
    with Learners(run, plan) as learners:
        validation = None
        if settings.validation is not None:
            counts = f"{len(learnt)} rationales to learn, {len(kept_out)} to validate on"
            say(f"{stage.training}: {counts}")
            validation = Validation(
                run,
                stage,
                settings.validation,
                settings.answer_weight,
                learners,
                kept_out,
                len(sizes),
            )
        course = _Course(run, stage, learnt, sizes, settings.answer_weight, validation)
        learners.wait_ready()
        run.directory.begin(stage.name, contents(run, stage.name))
        state = learners.run_until_done(
            fresh=lambda: RunState(stage.training),
            train=lambda state, bar: _train(course, learners, state, bar),
        )
    facts = {"validation": state.validation} if validation is not None else {}
    run.directory.finish(stage.training, steps=state.step, rationales=len(learnt), **facts)
    write_model_card(run, stage.policy)
    if validation is not None:
        validation.drop_all()
    picture = run.directory.path / training_picture(stage.training)
    plot_training(run.monitor.metrics_path, picture, stage.training)


def _train(course: _Course, learners: Learners, state: RunState, bar: Progress) -> None:
    """Takes all steps after ``state``, then exports the model."""
    run, validation = course.run, course.validation
    sampler = PromptSampler(len(course.pairs), run.config.seed)
    sampler.restore(state.sampler or sampler.state())
    if validation is not None:
        validation.resume(state)
    while True:
        # Here, not after the step: a resumed training may have missed that of its checkpoint.
        if validation is not None and validation.due(state):
            validation.validate(state)
        if state.step == bar.total or (validation is not None and validation.stops(state)):
            break
        if state.step and state.step % run.config.checkpoints.every == 0:
            learners.checkpoint(state, wait=True)
        run.interruption.check()
        _step(course, learners, sampler, state, bar)
    learners.check_learned()
    policy = run.directory.policy(course.stage.policy)
    if validation is not None:
        validation.export(state, policy)
    else:
        learners.export(policy)


def _step(
    course: _Course, learners: Learners, sampler: PromptSampler, state: RunState, bar: Progress
) -> None:
    """Takes one optimiser step and logs it."""
    batch = [course.pairs[row] for row in sampler.next(course.sizes[state.step])]
    started = time.monotonic()
    learned = learners.distill_step(
        [one.tokens for one in batch], answers_of(batch), course.answer_weight
    ).result()
    seconds = time.monotonic() - started
    state.step, state.sampler = state.step + 1, sampler.state()
    speed = {
        "seconds/learn": seconds,
        "speed/learner": learned.tokens / seconds,
        "speed/read": sum(one.length for one in batch) / seconds,
    }
    course.run.monitor.log(state.step, course.stage.training, {**learned.values, **speed})
    bar.update(1, loss=learned.loss)
