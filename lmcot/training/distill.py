"""Distillation: the small LM learns the teacher's rationales."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from lmcot.actors.learner_actor import LearnerPlan
from lmcot.actors.resources.cluster import check_plan
from lmcot.data.render import encode_continuation
from lmcot.data.sampler import PromptSampler
from lmcot.errors import UserError
from lmcot.models.limits import read_limits
from lmcot.monitor.progress import Progress, say
from lmcot.records import Annotation, RunState
from lmcot.run.context import Run
from lmcot.run.inputs import contents
from lmcot.run.roles import distill_roles
from lmcot.training.annotate import annotate
from lmcot.training.learners import Learners

if TYPE_CHECKING:
    from lmcot.learner.batching import TokenPair

STAGE: Final = "distill"


def distill(run: Run) -> None:
    """Trains on the kept rationales and writes ``distilled/``; does nothing if that is done."""
    if run.directory.finished(STAGE):
        say("distill: done already")
        return
    pairs = _pairs(run, annotate(run))
    if not pairs:
        raise UserError(
            f"there is nothing to distil: no rationale that was kept in "
            f"'{run.directory.rationales}' belongs to a question of data.train; delete that file, "
            "and 'lmcot annotate' makes it again"
        )
    settings = run.config.distill
    steps = math.ceil(len(pairs) * settings.epochs / settings.batch_size)
    plan = LearnerPlan(STAGE, run.config.policy.source, steps)
    check_plan(STAGE, distill_roles(run.config), run.config.actors)
    with Learners(run, plan) as learners:
        learners.wait_ready()
        run.directory.begin(STAGE, contents(run, STAGE))
        learners.run_until_done(
            fresh=lambda: RunState(STAGE),
            train=lambda state, bar: _train(run, learners, pairs, state, bar),
        )
    run.directory.finish(STAGE, steps=steps, rationales=len(pairs))


def _train(
    run: Run, learners: Learners, pairs: list[TokenPair], state: RunState, bar: Progress
) -> None:
    """Takes all steps after ``state``, then exports the model."""
    settings = run.config.distill
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
        run.monitor.log(state.step, STAGE, {**learned.values, **speed})
        bar.update(1, loss=learned.loss)
        if state.step % run.config.checkpoints.every == 0 and state.step < bar.total:
            learners.checkpoint(state, wait=True)
    learners.check_learned()
    learners.export(run.directory.distilled)


def _pairs(run: Run, annotations: list[Annotation]) -> list[TokenPair]:
    """Prompts and kept rationales as token ids, with EOS at the end."""
    limits = read_limits(run.config.policy.source, run.tokenizer)
    rationales = {a.example_id: a.rationale for a in annotations if a.kept}
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
            f"distill: {too_long} rationales are left out: with their prompts they do not fit into "
            f"the {limits.window} positions of '{limits.source}'"
        )
    return pairs
