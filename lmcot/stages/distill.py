"""Distillation: the small LM learns the teacher's rationales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from lmcot.actors.cluster import check_room
from lmcot.actors.fleet import Fleet
from lmcot.actors.learner_actor import LearnerPlan
from lmcot.data.sampler import PromptSampler
from lmcot.errors import Interrupted
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.monitor.progress import progress
from lmcot.records import Annotation, RunState
from lmcot.stages.annotate import annotate, read_annotations
from lmcot.stages.environment import versions
from lmcot.stages.run import Run, say

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
    rationales = run.directory.rationales
    pairs = _pairs(run, read_annotations(rationales) if rationales.exists() else annotate(run))
    settings = run.config.distill
    steps = math.ceil(len(pairs) * settings.epochs / settings.batch_size)
    store = CheckpointStore(
        run.directory.checkpoints, prefix="distill-step-", keep=run.config.checkpoints.keep
    )
    plan = LearnerPlan(STAGE, run.config.policy.source, steps)
    check_room({"learner": run.config.actors.learner})
    with run.learner_fleet(plan) as learner:
        learner.wait_ready()
        state = _resume(run, learner, store)
        sampler = PromptSampler(len(pairs), run.config.seed)
        sampler.restore(state.sampler or sampler.state())
        left = len(pairs) * settings.epochs - state.step * settings.batch_size
        try:
            with progress(STAGE, total=steps, done=state.step) as bar:
                while state.step < steps:
                    run.interruption.check()
                    rows = sampler.next(min(settings.batch_size, left))
                    left -= len(rows)
                    batch = [(pairs[row].prompt_ids, pairs[row].response_ids) for row in rows]
                    metrics = learner.call("distill_step", pairs=batch)[0]
                    state.step += 1
                    state.sampler = sampler.state()
                    run.monitor.log(state.step, STAGE, metrics)
                    bar.update(1, loss=metrics["loss"])
                    if state.step % run.config.checkpoints.every == 0 and state.step < steps:
                        _save(learner, store, state)
        except Interrupted:
            _save(learner, store, state)
            raise
        learner.call("export", folder=str(run.directory.distilled))
    run.directory.finish(STAGE, steps=steps, rationales=len(pairs))


def _pairs(run: Run, annotations: list[Annotation]) -> list[_Pair]:
    """Prompts and kept rationales as token ids, EOS at the end."""
    rationales = {a.example_id: a.rationale for a in annotations if a.kept}
    eos = run.tokenizer.eos_token_id
    return [
        _Pair(
            run.rationale_prompt(question.example),
            (*run.tokenizer.encode(rationale, add_special_tokens=False), eos),
        )
        for question in run.train
        if (rationale := rationales.get(question.example.id)) is not None
    ]


def _resume(run: Run, learner: Fleet, store: CheckpointStore) -> RunState:
    found = store.latest()
    state = RunState(STAGE, seeds={"run": run.config.seed}, versions=versions())
    if found is not None:
        state, folder = found
        learner.call("restore", folder=str(folder), state=state)
        say(f"distill: goes on after step {state.step}")
    run.monitor.truncate(STAGE, state.step)
    return state


def _save(learner: Fleet, store: CheckpointStore, state: RunState) -> None:
    store.save(state, lambda folder: learner.call("save_engine", folder=str(folder))[0])
