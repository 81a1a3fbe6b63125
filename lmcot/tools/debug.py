"""Runs parts of refinement by themselves: sampling alone, learning alone, or a step again.

What they write lies in ``debug/`` below the run directory; the run itself is left as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmcot import run_files
from lmcot.actors.resources.cluster import check_plan
from lmcot.actors.units import Packed
from lmcot.errors import UserError
from lmcot.learner.plan import refine_plan
from lmcot.monitor.catalogue import VARYING
from lmcot.monitor.metrics import Monitor, read_metrics
from lmcot.monitor.progress import progress, say
from lmcot.rollout_log import last_step, read_scored
from lmcot.run.context import Run
from lmcot.run.roles import distill_roles, judging_roles
from lmcot.training.learners import Learners
from lmcot.training.pipeline import Pipeline
from lmcot.training.refine import STAGE
from lmcot.training.start import fresh_state, open_fleets, start_source
from lmcot.training.step_metrics import mean_reward, step_metrics


class _Nothing:
    """A call that is done: nothing is lost."""

    def refs(self) -> list[Any]:
        return []

    def done(self) -> bool:
        return True

    def result(self) -> set[int]:
        return set()


class _NoLearners:
    """Stands in for the learners, with nothing to wait for or to lose."""

    def fetch(self, units: list[Any]) -> _Nothing:
        return _Nothing()

    def refs(self) -> list[Any]:
        return []

    def check(self) -> None:
        return

    def probe(self) -> None:
        return


def rollout_only(run: Run, *, steps: int, policy: str | None = None) -> list[dict[str, float]]:
    """Samples and judges the first steps' batches without a learner, to see whether there is
    signal.

    Args:
        policy: model source to sample with; unset: what refinement starts from.

    Returns:
        the metrics of each batch, which are also in ``debug/rollout/`` with the rationales.
    """
    roles = judging_roles(run.config)
    check_plan("debug rollout", roles, run.config.actors)
    ahead = run.config.refine.model_copy(update={"max_staleness": steps - 1, "steps": steps})
    run = replace(run, config=run.config.model_copy(update={"refine": ahead}))
    found = []
    with ExitStack() as stack:
        fleets = open_fleets(run, policy or start_source(run), stack)
        fleets.wait_ready()
        pipeline = stack.enter_context(Pipeline(run, fleets, _NoLearners(), fresh_state(run)))
        monitor = stack.enter_context(Monitor(_fresh(run, "rollout"), run.config.monitor))
        bar = stack.enter_context(progress("debug rollout", total=steps))
        pipeline.sample(0, ())
        for step in range(steps):
            batch = pipeline.take(step)
            metrics = {
                **step_metrics(batch.columns, run.config.refine.samples_per_prompt),
                **batch.choice_metrics,
            }
            monitor.log(step + 1, STAGE, metrics)
            monitor.rollouts(step + 1, batch.records)
            bar.update(1, reward=mean_reward(batch.columns))
            found.append(metrics)
    say(f"debug rollout: the rationales are in {run.directory.home / 'debug' / 'rollout'}")
    return found


def learn_only(run: Run, *, rollouts: Path | None = None, last: int | None = None) -> None:
    """Learns from rationales on disk, from the start of refinement, without any other actor.

    Args:
        rollouts: a folder of ``step-NNNNNN.jsonl``; unset: the run's own.
        last: the last step to learn from; unset: all available steps.

    Raises:
        UserError: if there are no rationales, or a step between others is missing.
    """
    folder = rollouts or run.directory.path / run_files.ROLLOUTS
    steps = last or last_step(folder)
    batches = [read_scored(folder, step) for step in range(1, steps + 1)]
    with ExitStack() as stack:
        learners = _start_learners(run, stack)
        monitor = stack.enter_context(Monitor(_fresh(run, "learn"), run.config.monitor))
        bar = stack.enter_context(progress("debug learn", total=steps))
        for step, batch in enumerate(batches):
            if not batch:
                bar.update(1)  # refine.filter left out all that the step asked
                continue
            learned = learners.ppo_step([Packed.of(batch)], step).result()
            monitor.log(step + 1, STAGE, learned.values)
            bar.update(1, reward=learned.values["reward/score"], kl=learned.kl)
    say(f"debug learn: the metrics are in {run.directory.home / 'debug' / 'learn'}")


def replay(run: Run, *, step: int, as_json: bool = False) -> dict[str, tuple[float, float]]:
    """Repeats a step's learning from the newest checkpoint before it, and prints its metrics.

    Args:
        as_json: a line of JSON in place of a table.

    Returns:
        the metrics that came out otherwise: name to (then, now). None does where the settings,
        the versions and the machine are the same.

    Raises:
        UserError: if the run has no such step, or its rationales are gone.
    """
    lines = {
        line["step"]: line
        for line in read_metrics(run.monitor.metrics_path)
        if line["stage"] == STAGE
    }
    if step not in lines:
        raise UserError(f"the run in '{run.directory.home}' has no step {step} to replay")
    with ExitStack() as stack:
        learners = _start_learners(run, stack)
        state = learners.resume(before=step) or fresh_state(run)
        say(f"debug replay: from step {state.step} on")
        folder = run.directory.path / run_files.ROLLOUTS
        batches = [read_scored(folder, number) for number in range(state.step + 1, step + 1)]
        if not batches[-1]:
            raise UserError(
                f"step {step} learnt nothing, since refine.filter left out all that it asked: "
                "replay another one"
            )
        metrics: dict[str, float] = {}
        for number, batch in enumerate(batches, start=state.step):
            if batch:
                metrics = learners.ppo_step([Packed.of(batch)], number).result().values
    differing = {
        name: (then, metrics[name])
        for name, then in lines[step].items()
        if name in metrics and metrics[name] != then and not name.startswith(VARYING)
    }
    _show(step, metrics, lines[step], differing, as_json=as_json)
    return differing


def _start_learners(run: Run, stack: ExitStack) -> Learners:
    check_plan("debug", distill_roles(run.config), run.config.actors)
    plan = refine_plan(run.config, start_source(run), run.config.refine.steps)
    learners = stack.enter_context(Learners(run, plan))
    learners.wait_ready()
    return learners


def _fresh(run: Run, what: str) -> Path:
    """An empty folder for a debug run's files."""
    folder = run.directory.path / "debug" / what
    (folder / run_files.METRICS).unlink(missing_ok=True)
    for old in (folder / run_files.ROLLOUTS, folder / run_files.TENSORBOARD):
        if old.exists():
            shutil.rmtree(old)
    return folder


def _show(
    step: int,
    now: dict[str, float],
    then: dict[str, Any],
    differing: dict[str, tuple[float, float]],
    *,
    as_json: bool,
) -> None:
    names: Sequence[str] = [name for name in now if name in then]
    if as_json:
        metrics = {
            name: {"then": then[name], "now": now[name], "differs": name in differing}
            for name in names
        }
        print(json.dumps({"step": step, "metrics": metrics}))
    else:
        for name in names:
            mark = "  <- differs" if name in differing else ""
            print(f"{name:28s} {then[name]!s:>24} {now[name]!s:>24}{mark}")
    verdict = f"{len(differing)} of {len(names)} metrics differ" if differing else "all equal"
    say(f"debug replay: step {step} then and now: {verdict}")
