"""Supervised training of the small LM on rationales, as distillation and its like do it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lmcot.config import DistillSettings, TrainingStage
from lmcot.data.render import encode_continuation
from lmcot.data.sampler import PromptSampler
from lmcot.learner.plan import LearnerPlan
from lmcot.models.limits import read_limits
from lmcot.monitor.progress import Progress, say
from lmcot.records import RunState
from lmcot.run.context import Run
from lmcot.run.inputs import contents
from lmcot.training.learners import Learners

if TYPE_CHECKING:
    from lmcot.learner.batching import TokenPair


def train_on(
    run: Run, stage: TrainingStage, settings: DistillSettings, source: str, pairs: list[TokenPair]
) -> None:
    """Trains a stage's policy on prompts and rationales, from a model source; resumes that.

    The caller has checked that the stage is not finished, and that its actors fit.
    """
    steps = math.ceil(len(pairs) * settings.epochs / settings.batch_size)
    plan = LearnerPlan(stage.name, source, steps, settings.optimiser)
    with Learners(run, plan) as learners:
        learners.wait_ready()
        run.directory.begin(stage.name, contents(run, stage.name))
        learners.run_until_done(
            fresh=lambda: RunState(stage.name),
            train=lambda state, bar: _train(run, stage, settings, learners, pairs, state, bar),
        )
    run.directory.finish(stage.name, steps=steps, rationales=len(pairs))


def _train(
    run: Run,
    stage: TrainingStage,
    settings: DistillSettings,
    learners: Learners,
    pairs: list[TokenPair],
    state: RunState,
    bar: Progress,
) -> None:
    """Takes all steps after ``state``, then exports the model."""
    sampler = PromptSampler(len(pairs), run.config.seed)
    sampler.restore(state.sampler or sampler.state())
    for step in range(state.step, bar.total):
        run.interruption.check()
        left = len(pairs) * settings.epochs - step * settings.batch_size
        rows = sampler.next(min(settings.batch_size, left))

        started = time.monotonic()
        learned = learners.distill_step([pairs[row] for row in rows]).result()
        seconds = time.monotonic() - started
        state.step, state.sampler = step + 1, sampler.state()

        speed = {"seconds/learn": seconds, "speed/learner": learned.tokens / seconds}
        run.monitor.log(state.step, stage.name, {**learned.values, **speed})
        bar.update(1, loss=learned.loss)
        if state.step % run.config.checkpoints.every == 0 and state.step < bar.total:
            learners.checkpoint(state, wait=True)
    learners.check_learned()
    learners.export(run.directory.policy(stage.policy))


def token_pairs(run: Run, stage: TrainingStage, rationales: Mapping[str, str]) -> list[TokenPair]:
    """Prompts and rationales as token ids, with EOS at the end.

    Args:
        rationales: by the id of their question of ``data.train``; questions without are left out.
    """
    limits = read_limits(run.config.policy.source, run.tokenizer)
    eos = run.tokenizer.eos_token_id
    pairs: list[TokenPair] = []
    too_long = 0
    for question in run.train:
        rationale = rationales.get(question.example.id)
        if rationale is not None:
            prompt = run.rationale_prompt(question.example)
            ids = encode_continuation(
                prompt, rationale, run.tokenizer, encoder_decoder=limits.encoder_decoder
            )
            if limits.fit(len(prompt), len(ids) + 1):
                pairs.append((prompt, (*ids, eos)))
            else:
                too_long += 1
    if too_long:
        say(
            f"{stage.name}: {too_long} rationales are left out: with their prompts they do not fit "
            f"into the {limits.window} positions of '{limits.source}'"
        )
    return pairs
