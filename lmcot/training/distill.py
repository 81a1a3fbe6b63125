"""Distillation: the small LM learns the teacher's rationales."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Final

from lmcot.actors.learner_actor import LearnerPlan
from lmcot.actors.learner_group import LearnerLost
from lmcot.actors.resources.cluster import check_plan
from lmcot.data.render import encode_continuation
from lmcot.data.sampler import PromptSampler
from lmcot.errors import Interrupted, UserError
from lmcot.models.limits import read_limits
from lmcot.monitor.progress import Progress, progress, say
from lmcot.records import Annotation, RunState
from lmcot.run.context import Run
from lmcot.run.inputs import contents
from lmcot.run.roles import distill_roles
from lmcot.run.versions import versions
from lmcot.training.annotate import annotate
from lmcot.training.learners import Learners

STAGE: Final = "distill"


@dataclass(frozen=True, slots=True)
class _Pair:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


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
        state = _state(run, learners.resume())
        try:
            with progress(STAGE, total=steps, done=state.step) as bar:
                while True:
                    try:
                        _finish(run, learners, state, pairs, bar)
                        break
                    except LearnerLost as lost:
                        state = _state(run, learners.recover(lost))
                        bar.move_to(state.step)
        except Interrupted:
            learners.save(state)
            raise
    run.directory.finish(STAGE, steps=steps, rationales=len(pairs))


def _finish(
    run: Run, learners: Learners, state: RunState, pairs: list[_Pair], bar: Progress
) -> None:
    """All steps that are left, then the export."""
    while state.step < bar.total:
        run.interruption.check()
        metrics = _step(run, learners, state, pairs)
        bar.update(1, loss=metrics["loss"])
    learners.check_learned()
    learners.export(run.directory.distilled)


def _step(run: Run, learners: Learners, state: RunState, pairs: list[_Pair]) -> dict[str, float]:
    """One optimiser step; advances ``state``, and saves it when that is due."""
    settings = run.config.distill
    sampler = PromptSampler(len(pairs), run.config.seed)
    sampler.restore(state.sampler or sampler.state())
    left = len(pairs) * settings.epochs - state.step * settings.batch_size
    rows = sampler.next(min(settings.batch_size, left))
    batch = [(pairs[row].prompt_ids, pairs[row].response_ids) for row in rows]
    started = time.monotonic()
    metrics = learners.learn("distill_step", pairs=batch)
    seconds = time.monotonic() - started
    metrics |= {"seconds/learn": seconds, "speed/learner": metrics["batch/tokens"] / seconds}
    state.step += 1
    state.sampler = sampler.state()
    run.monitor.log(state.step, STAGE, metrics)
    if state.step % run.config.checkpoints.every == 0 and left > len(rows):
        learners.save(state)
    return metrics


def _pairs(run: Run, annotations: list[Annotation]) -> list[_Pair]:
    """Prompts and kept rationales as token ids, EOS at the end."""
    limits = read_limits(run.config.policy.source, run.tokenizer)
    rationales = {a.example_id: a.rationale for a in annotations if a.kept}
    eos = run.tokenizer.eos_token_id
    pairs, too_long = [], 0
    for question in run.train:
        rationale = rationales.get(question.example.id)
        if rationale is not None:
            prompt = run.rationale_prompt(question.example)
            ids = encode_continuation(
                prompt, rationale, run.tokenizer, encoder_decoder=limits.encoder_decoder
            )
            if limits.fit(len(prompt), len(ids) + 1):
                pairs.append(_Pair(prompt, (*ids, eos)))
            else:
                too_long += 1
    if too_long:
        say(
            f"distill: {too_long} rationales are left out: with their prompts they do not fit into "
            f"the {limits.window} positions of '{limits.source}'"
        )
    return pairs


def _state(run: Run, found: RunState | None) -> RunState:
    """The state to go on from: a checkpoint's, or a fresh one."""
    state = found or RunState(STAGE, seeds={"run": run.config.seed}, versions=versions())
    if found is not None:
        say(f"distill: goes on after step {state.step}")
    run.monitor.truncate(STAGE, state.step)
    return state
