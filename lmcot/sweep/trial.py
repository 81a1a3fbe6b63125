"""One trial of a sweep is `refine` in its own placement group and run directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ray
from ray import tune

from lmcot import run_files
from lmcot.errors import UserError
from lmcot.monitor.metrics import read_metrics
from lmcot.process import use_threads
from lmcot.run.context import open_run
from lmcot.run.roles import refine_roles
from lmcot.sweep.space import SweepSettings, Trial
from lmcot.training import refine as stage

_ROUNDING = 1e-9


def run_trial(
    config: dict[str, Any], *, sweep: SweepSettings, trials: dict[int, Trial], folder: str
) -> None:
    """Ray Tune's trainable: refines with a trial's settings, and reports every step to Tune.

    Args:
        config: holds the trial's number.
        folder: folder of the trials' run directories.
    """
    use_threads(threads=1)
    trial = trials[config["trial"]]
    path = Path(folder) / trial.name
    told = 0

    def tell(upto: int) -> None:
        nonlocal told
        # From the file, so that Tune also gets the steps before a resume, and no step twice.
        for step, value in enumerate(running_means(path, sweep)[told:upto], told + 1):
            tune.report({"step": step, "value": value})
            told = step

    def on_step(step: int, _: dict[str, float]) -> None:
        # A trial that is stopped at its last step would not get to write its results.
        tell(min(step, trial.config.refine.steps - 1))

    with open_run(trial.config, path, varied=trial.values.keys()) as run:
        stage.refine(run, on_step=on_step)
    tell(trial.config.refine.steps)


def steps_done(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a trial's steps so far."""
    lines = read_metrics(folder / run_files.METRICS)
    return [line for line in lines if line["stage"] == stage.STAGE]


def running_means(folder: Path, sweep: SweepSettings) -> list[float]:
    """The metric after each step, as trials are compared by it: a mean over the last steps.

    NaN where none of them has a value.

    Raises:
        UserError: if the steps have no such metric.
    """
    values: list[float | None] = []
    for line in steps_done(folder):
        if sweep.metric not in line:
            known = ", ".join(sorted(line.keys() - {"step", "stage", "time"}))
            raise UserError(
                f"'{sweep.metric}' is not a metric of refine's steps: set metric to one of {known}"
            )
        values.append(line[sweep.metric])
    means = []
    for end in range(1, len(values) + 1):
        window = [v for v in values[max(end - sweep.average_over, 0) : end] if v is not None]
        means.append(math.fsum(window) / len(window) if window else math.nan)
    return means


def bundles(trial: Trial, sweep: SweepSettings) -> list[dict[str, float]]:
    """What a trial reserves: a bundle for its driver, then one for each of its actors."""
    return [
        bundle for count, bundle in _reserved(trial, sweep).values() for _ in range(count) if bundle
    ]


def check_fits(trial: Trial, sweep: SweepSettings) -> None:
    """Compares what a trial reserves with what the cluster has.

    Raises:
        UserError: naming what is short, before the trial waits for it for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    reserved = _reserved(trial, sweep)
    for key, (_, bundle) in reserved.items():
        if not any(all(node.get(n, 0.0) >= bundle[n] for n in bundle) for node in nodes):
            raise UserError(
                f"{key} asks for {_listed(bundle)}, but no node of the cluster has that: lower it, "
                "or add such a node"
            )
    for name in sorted({name for _, bundle in reserved.values() for name in bundle}):
        need = math.fsum(count * bundle.get(name, 0.0) for count, bundle in reserved.values())
        have = math.fsum(node.get(name, 0.0) for node in nodes)
        if need > have + _ROUNDING:
            parts = ", ".join(
                f"{key} {count} x {bundle[name]:g}"
                for key, (count, bundle) in reserved.items()
                if name in bundle
            )
            raise UserError(
                f"the cluster has {have:g} {name}, but trial '{trial.name}' takes {need:g} "
                f"({parts}): lower these, or add nodes"
            )


def _reserved(trial: Trial, sweep: SweepSettings) -> dict[str, tuple[int, dict[str, float]]]:
    """How many bundles of which size, by the setting that says so; the driver's comes first."""
    reserved = {"driver_cpus": (1, {"CPU": sweep.driver_cpus})}
    for name, role in refine_roles(trial.config).items():
        bundle = {"CPU": role.cpus, "GPU": role.gpus, **role.resources}
        needed = {resource: amount for resource, amount in bundle.items() if amount}
        reserved[f"actors.{name}"] = (role.count, needed)
    return reserved


def _listed(bundle: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
