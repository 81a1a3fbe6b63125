"""A sweep: `refine` over a search space, as trials of Ray Tune that ASHA stops early.

Ray Tune runs the trials; their results are in their run directories and in the sweep's own
record, from which the same command resumes: a kill leaves nothing half written there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle, tune
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler

from lmcot.actors.resources.cluster import ray_cluster
from lmcot.config import dump_config, load_config
from lmcot.config.stages import BASE, stage_of_policy
from lmcot.errors import UserError
from lmcot.files import write_atomically
from lmcot.monitor.progress import Progress, progress, say
from lmcot.run.directory import DirectoryInUse, RunDirectory
from lmcot.run.interruption import Interruption
from lmcot.run.policies import check_policy
from lmcot.storage import is_remote
from lmcot.sweep.space import SweepSettings, Trial, load_sweep, plan_trials
from lmcot.sweep.table import SweepTable
from lmcot.sweep.trial import bundles, check_fits, run_trial, running_means
from lmcot.training import refine as stage

if TYPE_CHECKING:
    from lmcot.storage import Place

_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials have metrics of their own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `Interruption` has it
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output is not silent at verbosity 0
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # settings may hold relative paths
}
_NOTICE = "ending the sweep; its trials can resume from their last checkpoints"
_FREED_S = 30.0
"""Time limit for the processes of a killed sweep to end."""


def sweep(
    config: str | Path, overrides: list[str], space: str | Path, run_dir: Place, *,
    retry: bool, as_json: bool = False,
) -> None:  # fmt: skip
    """Runs the remaining trials, prints the table, and writes the best settings.

    Args:
        config: file of the settings that the trials share.
        space: file of the search space.
        retry: whether trials that failed are run again.
        as_json: a line of JSON, what ``sweep.json`` holds, in place of the table.

    Raises:
        UserError: before a trial starts, if settings, space or directory are wrong; or if all
            trials failed.
        Interrupted: the same call resumes.
    """
    if is_remote(run_dir):
        raise UserError(
            f"the run directory of a sweep cannot be at a URL ('{run_dir}'): its trials share a "
            "folder; give one on a file system that all nodes see"
        )
    settings = load_sweep(space)
    trials = plan_trials(config, overrides, settings)
    base = load_config(config, overrides)
    run_dir = run_dir.absolute()
    with RunDirectory(run_dir) as directory:
        for difference in directory.check_config(base):
            say(f"resumed with another {difference}")
        table = SweepTable(run_dir, settings, trials)
        left = table.numbers("unfinished", *(("failed",) if retry else ()))
        if left:
            for number in left:
                _prepare(table.folder / table.rows[number].trial, trials[number - 1], directory)
            # After Ray, which sets a signal handler of its own.
            with ray_cluster(base.actors), Interruption(_NOTICE) as interruption:
                _check_cluster(settings, [trials[number - 1] for number in left])
                directory.write_config(base)
                table.write()
                _run(settings, trials, left, table, interruption)
        table.write()
        _conclude(run_dir, trials, table, as_json=as_json)


def _check_cluster(settings: SweepSettings, trials: list[Trial]) -> None:
    """Refuses a cluster that the trials cannot run on."""
    if ray.util.client.ray.is_connected():
        raise UserError(
            "a sweep cannot be run through a Ray client ('ray://...'): run it on a node of the "
            "cluster, with actors.address 'auto'"
        )
    for trial in trials:
        check_fits(trial, settings)


def _conclude(run_dir: Path, trials: list[Trial], table: SweepTable, *, as_json: bool) -> None:
    """Prints the table and writes the best settings."""
    told = json.dumps(table.record_of_all()) + "\n" if as_json else table.markdown()
    print(told, end="", flush=True)
    best = table.best()
    if best is not None:
        write_atomically(run_dir / "best.yaml", dump_config(trials[best - 1].config))
        say(f"the best settings, those of trial {best:04d}, are in '{run_dir}/best.yaml'")
    if len(table.numbers("failed")) == len(trials):
        raise UserError(
            f"none of the {len(trials)} trials could be run; the first failure: "
            f"{table.rows[1].reason}; fix that and run the same command with --retry-failed"
        )


def _prepare(folder: Path, trial: Trial, sweep_directory: RunDirectory) -> None:
    """Makes a trial's run directory, with the policy that all start from.

    Raises:
        UserError: if there is no such policy.
    """
    deadline = time.monotonic() + _FREED_S
    while True:
        try:
            with RunDirectory(folder) as directory:
                if (policy := trial.config.refine.start_from) != BASE:
                    check_policy(
                        sweep_directory,
                        trial.config,
                        policy,
                        "for the trials to start from",
                        "refine.start_from",
                    )
                    _link_policy(directory, sweep_directory, policy)
            return
        except DirectoryInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _link_policy(directory: RunDirectory, source: RunDirectory, policy: str) -> None:
    made_by = stage_of_policy(policy).name
    facts = source.finished(made_by) or {}
    link = directory.path / policy
    if not link.is_symlink():
        there = os.path.relpath(source.path / policy, directory.path)
        link.symlink_to(there, target_is_directory=True)
    directory.finish(made_by, **facts)


def _run(
    settings: SweepSettings,
    trials: list[Trial],
    left: list[int],
    table: SweepTable,
    interruption: Interruption,
) -> None:
    """Has Ray Tune run the remaining trials."""
    by_number = {trial.number: trial for trial in trials}
    storage = table.folder.with_name("tune")
    shutil.rmtree(storage, ignore_errors=True)
    trainable = tune.with_parameters(
        run_trial, sweep=settings, trials=by_number, folder=str(table.folder)
    )
    placed = tune.with_resources(
        trainable,
        lambda point: tune.PlacementGroupFactory(bundles(by_number[point["trial"]], settings)),
    )
    done = len(trials) - len(left)
    with progress("sweep", total=len(trials), unit="trial", done=done) as bar, _tune_set_up():
        watch = _Watch(settings, trials, table, interruption, bar)
        tuner = tune.Tuner(
            placed,
            param_space={"trial": tune.grid_search(left)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(settings, trials, left, table),
                max_concurrent_trials=settings.concurrent,
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=str(storage), callbacks=[watch], verbose=0
            ),
        )
        try:
            tuner.fit()
        except TuneError as error:
            if isinstance(error.__context__, UserError):  # `watch` raised it while Tune called it
                raise error.__context__ from None
            raise


def _scheduler(
    settings: SweepSettings, trials: list[Trial], left: list[int], table: SweepTable
) -> ASHAScheduler:
    """ASHA, which is given the finished trials to compare the others with."""
    steps = trials[0].config.refine.steps
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="value",
        mode=settings.mode,
        max_t=steps,
        grace_period=settings.asha.grace_steps,
        reduction_factor=settings.asha.reduction_factor,
        brackets=settings.asha.brackets,
        stop_last_trials=False,
    )
    for number, row in table.rows.items():
        if number in left:
            continue
        seen = SimpleNamespace(trial_id=row.trial)
        scheduler.on_trial_add(None, seen)
        for step, value in enumerate(running_means(table.folder / row.trial, settings), 1):
            scheduler.on_trial_result(None, seen, {"step": step, "value": value})
    return scheduler


@contextmanager
def _tune_set_up() -> Iterator[None]:
    """Turns off Ray Tune's own reports and logs, which would bury ours."""
    before = {name: os.environ.get(name) for name in _TUNE}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_TUNE)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Watch(tune.Callback):
    """Records and shows the trials' results, and ends the sweep on request."""

    def __init__(
        self,
        settings: SweepSettings,
        trials: list[Trial],
        table: SweepTable,
        interruption: Interruption,
        bar: Progress,
    ) -> None:
        self._settings = settings
        self._trials = trials
        self._table = table
        self._interruption = interruption
        self._bar = bar
        self._started: dict[int, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its callbacks only for its own resume, which is not used here."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Checks for a request to end; the exception it raises ends Tune."""
        if self._interruption.requested:
            for number in list(self._started):
                self._table.record(number, "unfinished", None, self._seconds(number))
        self._interruption.check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes the trial's start time."""
        self._started[trial.config["trial"]] = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Shows the progress."""
        if "step" in result:
            values = {self._settings.metric: result["value"]}
            self._bar.update(0, trial=trial.config["trial"], step=result["step"], **values)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records a trial that finished or was stopped early."""
        number = trial.config["trial"]
        directory = RunDirectory(self._table.folder / self._table.rows[number].trial)
        facts = directory.finished(stage.STAGE)
        steps = self._trials[number - 1].config.refine.steps
        self._end(number, "finished" if facts and facts["steps"] >= steps else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records a trial that failed, and why."""
        self._end(trial.config["trial"], "failed", _reason(trial))

    def _end(self, number: int, status: Any, reason: str | None = None) -> None:
        row = self._table.record(number, status, reason, self._seconds(number))
        metric = f", {self._settings.metric} {row.last:.4g}" if row.last is not None else ""
        steps = f"{row.steps} of {self._trials[number - 1].config.refine.steps} steps"
        because = f": {reason}" if reason else ""
        self._bar.write(f"trial {row.trial}: {status} after {steps}{metric}{because}")
        self._bar.update(1)

    def _seconds(self, number: int) -> float:
        return time.monotonic() - self._started.pop(number, time.monotonic())


def _reason(trial: Any) -> str:
    """The first line of what a trial raised, from the file where Tune keeps it."""
    if trial.pickled_error_file is None:
        return "Ray Tune could not run it: see Ray's logs"
    with Path(trial.pickled_error_file).open("rb") as file:
        error = cloudpickle.load(file)
    cause = getattr(error, "cause", None) or error
    text = (str(cause).strip().splitlines() or [""])[0]
    return text if isinstance(cause, UserError) else f"{type(cause).__name__}: {text}"
