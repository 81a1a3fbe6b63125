"""Refinement: PPO on the frozen LM's rewards. The loop is `refine`, one turn of it `_step`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from lmcot.actors.cluster import check_room
from lmcot.actors.fleet import Fleet
from lmcot.actors.learner_actor import LearnerPlan
from lmcot.actors.units import JudgeUnit, RolloutPrompt, RolloutUnit
from lmcot.data.sampler import PromptSampler
from lmcot.errors import Interrupted, UserError
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.monitor.curves import plot_training
from lmcot.monitor.progress import progress
from lmcot.records import Example, Judgement, Rollout, RunState, ScoredRollout, to_json
from lmcot.rewards.combine import scalar_reward
from lmcot.stages.environment import versions
from lmcot.stages.run import Run, in_units, say
from lmcot.stages.summary import step_metrics

STAGE: Final = "refine"


@dataclass(slots=True)
class _Fleets:
    """The actors of this stage."""

    rollout: Fleet
    reward: Fleet
    learner: Fleet


def refine(run: Run) -> None:
    """Runs PPO up to ``refine.steps`` and writes ``refined/``; goes on where it was left.

    Raises:
        UserError: if there is no distilled model to start from, or too few rationales could be
            judged (after a checkpoint).
    """
    steps = run.config.refine.steps
    finished = run.directory.finished(STAGE)
    if finished and finished["steps"] >= steps:
        say("refine: done already")
        return
    store = CheckpointStore(run.directory.checkpoints, keep=run.config.checkpoints.keep)
    with ExitStack() as stack:
        fleets = _start(run, stack)
        state, sampler = _resume(run, fleets, store)
        saved = state.step
        try:
            with progress(STAGE, total=steps, done=state.step) as bar:
                while state.step < steps:
                    run.interruption.check()
                    metrics = _step(run, fleets, state, sampler)
                    bar.update(1, reward=metrics["reward/mean"], kl=metrics["kl"])
                    if state.step % run.config.checkpoints.every == 0 or state.step == steps:
                        _save(fleets, store, state)
                        saved = state.step
        except (Interrupted, UserError):
            if saved != state.step:
                _save(fleets, store, state)
            raise
        fleets.learner.call("export", folder=str(run.directory.refined))
    run.directory.finish(STAGE, steps=steps)
    plot_training(run.monitor.metrics_path, run.directory.path / "refine.png", STAGE)


def _step(run: Run, fleets: _Fleets, state: RunState, sampler: PromptSampler) -> dict[str, float]:
    """One PPO step: sample, judge, learn, publish. Advances ``state`` once all is done."""
    started = time.monotonic()
    rows = sampler.next(run.config.refine.prompts_per_step)
    examples = {q.example.id: q.example for q in (run.train[row] for row in rows)}
    rollouts = _sample(run, fleets, state, list(examples.values()))
    sampled = time.monotonic()
    judgements = _judge(run, fleets, examples, rollouts)
    judged = time.monotonic()
    scored = _score(run, rollouts, judgements)
    learned = fleets.learner.call("ppo_step", scored=scored, step=state.step)[0]
    version = state.step + 1
    weights = fleets.learner.call("publish", version=version)[0]
    fleets.rollout.call("use_weights", restored=True, weights=weights)
    state.step = version
    state.policy_version = version
    state.sampler = sampler.state()
    state.kl_controller = fleets.learner.call("kl_state")[0]
    metrics = {
        **step_metrics(rollouts, judgements, scored),
        **learned,
        "seconds/sample": sampled - started,
        "seconds/judge": judged - sampled,
        "seconds/learn": time.monotonic() - judged,
        "actor_restarts": float(fleets.rollout.restarts + fleets.reward.restarts),
    }
    run.monitor.log(state.step, STAGE, metrics)
    run.monitor.rollouts(state.step, _records(rollouts, judgements, scored))
    return metrics


def _sample(run: Run, fleets: _Fleets, state: RunState, examples: list[Example]) -> list[Rollout]:
    """K rationales for each question, by the current policy."""
    config = run.config
    groups = in_units(range(len(examples)), config.actors.prompts_per_unit)
    units = [
        RolloutUnit(
            unit_id=f"step-{state.step + 1}/{number}",
            prompts=tuple(
                RolloutPrompt(examples[i].id, run.rationale_prompt(examples[i])) for i in rows
            ),
            samples=config.refine.samples_per_prompt,
            temperature=config.policy.temperature,
            max_new_tokens=config.policy.max_new_tokens,
            seed=config.seed,
            step=state.step,
            policy_version=state.policy_version,
        )
        for number, rows in enumerate(groups)
    ]
    return [rollout for unit in fleets.rollout.map("sample", units) for rollout in unit]


def _judge(
    run: Run, fleets: _Fleets, examples: dict[str, Example], rollouts: list[Rollout]
) -> list[Judgement]:
    """A judgement or a typed failure for each rationale, unit by unit as they were sampled."""
    units: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        units.setdefault(rollout.unit_id, []).append(rollout)
    work = [
        JudgeUnit(unit_id, tuple(examples[r.example_id] for r in members), tuple(members))
        for unit_id, members in units.items()
    ]
    return [judgement for unit in fleets.reward.map("judge", work) for judgement in unit]


def _score(run: Run, rollouts: list[Rollout], judgements: list[Judgement]) -> list[ScoredRollout]:
    """What goes into the batch: what could not be judged is left out, never given a reward.

    Raises:
        UserError: if less than ``refine.min_judged_share`` of the step was judged.
    """
    scored = [
        ScoredRollout(rollout, judgement, scalar_reward(judgement, run.config.rewards))
        for rollout, judgement in zip(rollouts, judgements, strict=True)
        if judgement.failure is None
    ]
    needed = run.config.refine.min_judged_share * len(rollouts)
    if not scored or len(scored) < needed:
        reasons = [j.failure.reason for j in judgements if j.failure is not None]
        raise UserError(
            f"only {len(scored)} of a step's {len(rollouts)} rationales could be judged, fewer "
            f"than refine.min_judged_share asks for; the first failure: {reasons[0]}"
        )
    return scored


def _start(run: Run, stack: ExitStack) -> _Fleets:
    """Starts the actors; all of them load at the same time."""
    config = run.config
    source = _start_source(run)
    roles: dict[str, Any] = {
        "rollout": config.actors.rollout,
        "reward": config.actors.reward,
        "learner": config.actors.learner,
    }
    needs_frozen = config.rewards.kind == "guidance"
    if needs_frozen:
        roles["frozen"] = config.actors.frozen
    check_room(roles)
    plan = LearnerPlan(STAGE, source, config.refine.steps)
    frozen = stack.enter_context(run.frozen_fleet()) if needs_frozen else None
    learner = stack.enter_context(run.learner_fleet(plan))
    rollout = stack.enter_context(run.rollout_fleet(source))
    reward = stack.enter_context(run.reward_fleet())
    for fleet in (frozen, learner, rollout):
        if fleet is not None:
            fleet.wait_ready()
    reward.wait_ready(frozen_handles=frozen.handles if frozen else [])
    return _Fleets(rollout, reward, learner)


def _start_source(run: Run) -> str:
    if run.config.refine.start_from == "base":
        return run.config.policy.source
    if not run.directory.finished("distill"):
        raise UserError(
            f"there is no distilled model in '{run.directory.path}' to refine: run 'lmcot distill' "
            "on this run directory first, or set refine.start_from to 'base'"
        )
    return str(run.directory.distilled)


def _resume(run: Run, fleets: _Fleets, store: CheckpointStore) -> tuple[RunState, PromptSampler]:
    """The state to go on from: the newest checkpoint's, or a fresh one."""
    sampler = PromptSampler(len(run.train), run.config.seed)
    state = RunState(
        STAGE,
        sampler=sampler.state(),
        seeds={"run": run.config.seed},
        versions=versions(),
    )
    found = store.latest()
    if found is not None:
        state, folder = found
        sampler.restore(state.sampler)
        fleets.learner.call("restore", folder=str(folder), state=state)
        weights = fleets.learner.call("publish", version=state.policy_version)[0]
        fleets.rollout.call("use_weights", restored=True, weights=weights)
        say(f"refine: goes on after step {state.step}")
    run.monitor.truncate(STAGE, state.step)
    return state, sampler


def _save(fleets: _Fleets, store: CheckpointStore, state: RunState) -> None:
    store.save(state, lambda folder: fleets.learner.call("save_engine", folder=str(folder))[0])


def _records(
    rollouts: list[Rollout], judgements: list[Judgement], scored: list[ScoredRollout]
) -> list[dict[str, Any]]:
    """One record for each rationale of a step; ``reward`` is null where it was not judged."""
    rewards = {(s.rollout.example_id, s.rollout.sample): s.reward for s in scored}
    return [
        {
            **to_json(rollout),
            "judgement": to_json(judgement),
            "reward": rewards.get((rollout.example_id, rollout.sample)),
        }
        for rollout, judgement in zip(rollouts, judgements, strict=True)
    ]
