"""Refinement: PPO on the frozen LM's rewards. The loop is `refine`, one turn of it `_step`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from lmcot.actors.cluster import check_room
from lmcot.actors.fleet import Fleet
from lmcot.actors.learner_actor import LearnerPlan
from lmcot.actors.learner_group import LearnerLost
from lmcot.actors.units import Judged, JudgeUnit, RolloutPrompt, RolloutUnit
from lmcot.config import Config, RoleSettings
from lmcot.data.sampler import PromptSampler
from lmcot.errors import Interrupted, UserError
from lmcot.monitor.curves import plot_training
from lmcot.monitor.progress import Progress, progress, say
from lmcot.records import Example, Judgement, Rollout, RunState, ScoredRollout, Usage, to_json
from lmcot.rewards.combine import penalties, scalar_reward
from lmcot.stages.budgets import Losses
from lmcot.stages.environment import versions
from lmcot.stages.learners import Learners
from lmcot.stages.run import Run, in_units
from lmcot.stages.summary import step_metrics, usage_metrics

STAGE: Final = "refine"


@dataclass(slots=True)
class _Actors:
    """The actors of this stage."""

    rollout: Fleet
    reward: Fleet
    learners: Learners
    version: int | None = 0
    """Of the policy that the rollout actors hold; None if that is to be seen to."""


def refine(
    run: Run, *, on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
) -> None:
    """Refines up to ``refine.steps`` and writes ``refined/``; goes on where it was left.

    Args:
        on_step: told each step's number and metrics once it is done.

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
        actors = _start(run, stack)
        state = _resume(run, actors, actors.learners.resume())
        try:
            with progress(STAGE, total=steps, done=state.step) as bar:
                while True:
                    try:
                        _finish(run, actors, state, bar, on_step)
                        break
                    except LearnerLost as lost:
                        state = _resume(run, actors, actors.learners.recover(lost))
                        bar.move_to(state.step)
        except (Interrupted, UserError):
            actors.learners.save(state)
            raise
    run.directory.finish(STAGE, steps=steps)
    plot_training(run.monitor.metrics_path, run.directory.path / "refine.png", STAGE)


def _finish(
    run: Run,
    actors: _Actors,
    state: RunState,
    bar: Progress,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """All steps that are left, then the export."""
    steps = run.config.refine.steps
    while state.step < steps:
        run.interruption.check()
        metrics = _step(run, actors, state)
        bar.update(1, reward=metrics["reward/mean"], kl=metrics["kl"])
        if state.step % run.config.checkpoints.every == 0 or state.step == steps:
            actors.learners.begin_save(state)
        on_step(state.step, metrics)
    actors.learners.export(run.directory.refined, run.directory.critic)


def _step(run: Run, actors: _Actors, state: RunState) -> dict[str, float]:
    """One PPO step: publish, sample, judge, learn.

    ``state`` advances with the learners: what may be interrupted comes before.
    """
    started = time.monotonic()
    _publish(actors, state.policy_version)
    published = time.monotonic()
    sampler = PromptSampler(len(run.train), run.config.seed)
    sampler.restore(state.sampler)
    rows = sampler.next(run.config.refine.prompts_per_step)
    examples = {q.example.id: q.example for q in (run.train[row] for row in rows)}
    rollouts = _sample(run, actors, state, list(examples.values()))
    sampled = time.monotonic()
    judging = _judge(run, actors, state.step, examples, rollouts)
    judgements = judging.judgements
    judged = time.monotonic()
    scored = _score(run, rollouts, judgements)
    actors.learners.finish_save()  # begun after the last step, and done by now
    learned = actors.learners.learn("ppo_step", scored=scored, step=state.step)
    state.kl_controller, state.reward_statistics = actors.learners.call("controllers")[0]
    state.step += 1
    state.policy_version = state.step
    state.sampler = sampler.state()
    metrics = {
        **step_metrics(rollouts, judgements, scored, [_penalties(run, s.rollout) for s in scored]),
        **learned,
        **usage_metrics(judging.usage),
        "seconds/publish": published - started,
        "seconds/sample": sampled - published,
        "seconds/judge": judged - sampled,
        "seconds/learn": time.monotonic() - judged,
        "actor_restarts": float(actors.rollout.restarts + actors.reward.restarts),
        "learner_restarts": float(actors.learners.restarts),
    }
    run.monitor.log(state.step, STAGE, metrics)
    run.monitor.rollouts(state.step, _records(rollouts, judgements, scored))
    return metrics


def _publish(actors: _Actors, version: int) -> None:
    """Brings the learners' weights to the rollout actors, if they hold others."""
    if actors.version == version:
        return
    weights = actors.learners.call("publish", version=version)[0]
    actors.rollout.call("use_weights", restored=True, weights=weights)
    actors.version = version


def _sample(run: Run, actors: _Actors, state: RunState, examples: list[Example]) -> list[Rollout]:
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
    return [rollout for unit in actors.rollout.map("sample", units) for rollout in unit]


def _judge(
    run: Run, actors: _Actors, step: int, examples: dict[str, Example], rollouts: list[Rollout]
) -> Judged:
    """A judgement or a typed failure for each rationale, unit by unit as they were sampled."""
    units: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        units.setdefault(rollout.unit_id, []).append(rollout)
    work = [
        JudgeUnit(unit_id, tuple(examples[r.example_id] for r in members), tuple(members))
        for unit_id, members in units.items()
    ]
    losses = Losses(run.config.failures, len(rollouts), f"judgements of step {step + 1}")

    def count(_: int, unit: Judged) -> None:
        run.spending.add(STAGE, unit.usage)
        losses.add(judgement.failure for judgement in unit.judgements)

    done: list[Judged] = actors.reward.map("judge", work, on_result=count)
    judgements = [judgement for unit in done for judgement in unit.judgements]
    return Judged(judgements, sum((unit.usage for unit in done), Usage()))


def _score(run: Run, rollouts: list[Rollout], judgements: list[Judgement]) -> list[ScoredRollout]:
    """What goes into the batch: what could not be judged is left out, never given a reward.

    Raises:
        UserError: if nothing is left, whatever the budgets for failures say.
    """
    scored = [
        ScoredRollout(
            rollout,
            judgement,
            scalar_reward(judgement, run.config.rewards) - sum(_penalties(run, rollout).values()),
        )
        for rollout, judgement in zip(rollouts, judgements, strict=True)
        if judgement.failure is None
    ]
    if not scored:
        reasons = [j.failure.reason for j in judgements if j.failure is not None]
        raise UserError(
            f"none of a step's {len(rollouts)} rationales could be judged; the first failure: "
            f"{reasons[0]}; mend that and run the same command again"
        )
    return scored


def _penalties(run: Run, rollout: Rollout) -> dict[str, float]:
    return penalties(rollout, run.config.refine, run.config.policy.max_new_tokens)


def roles(config: Config) -> dict[str, RoleSettings]:
    """The fleets of actors that this stage starts, by role."""
    actors = config.actors
    started = {"rollout": actors.rollout, "reward": actors.reward, "learner": actors.learner}
    return {**started, **({"frozen": actors.frozen} if config.rewards.kind == "guidance" else {})}


def _start(run: Run, stack: ExitStack) -> _Actors:
    """Starts the actors; all of them load at the same time."""
    config = run.config
    source = _start_source(run)
    needs_frozen = config.rewards.kind == "guidance"
    check_room(roles(config))
    learners = Learners(run, LearnerPlan(STAGE, source, config.refine.steps))
    frozen = stack.enter_context(run.frozen_fleet()) if needs_frozen else None
    stack.enter_context(learners)
    rollout = stack.enter_context(run.rollout_fleet(source, trains=True))
    reward = stack.enter_context(run.reward_fleet())
    if frozen is not None:
        frozen.wait_ready()
    learners.wait_ready()
    rollout.wait_ready()
    reward.wait_ready(frozen_handles=frozen.handles if frozen else [])
    return _Actors(rollout, reward, learners)


def _start_source(run: Run) -> str:
    if run.config.refine.start_from == "base":
        return run.config.policy.source
    if not run.directory.finished("distill"):
        raise UserError(
            f"there is no distilled model in '{run.directory.path}' to refine: run 'lmcot distill' "
            "on this run directory first, or set refine.start_from to 'base'"
        )
    return str(run.directory.distilled)


def _resume(run: Run, actors: _Actors, found: RunState | None) -> RunState:
    """The state to go on from: a checkpoint's, or a fresh one."""
    if found is None:
        sampler = PromptSampler(len(run.train), run.config.seed)
        state = RunState(
            STAGE, sampler=sampler.state(), seeds={"run": run.config.seed}, versions=versions()
        )
    else:
        state = found
        say(f"refine: goes on after step {state.step}")
    if found is not None or actors.learners.restarts:
        actors.version = None
    run.monitor.truncate(STAGE, state.step)
    return state


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
