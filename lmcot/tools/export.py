"""`lmcot export` writes a run's settings and metrics into Weights & Biases or MLflow.

It reads what the run directory holds, so it can neither slow nor end a run. Each export makes a run
of its own there.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmcot import run_files
from lmcot.config import flat_settings, read_config
from lmcot.errors import UserError
from lmcot.monitor.metrics import read_metrics
from lmcot.monitor.progress import say
from lmcot.storage import on_disk, reaching

if TYPE_CHECKING:
    from lmcot.storage import Place

_KEYS: Final = frozenset({"step", "stage", "time"})
_BATCH: Final = 1000
"""Most metrics of a request to MLflow."""
_LONGEST: Final = 500
"""Most characters of a setting in MLflow."""


def export(run: Place, tracker: str, project: str) -> None:
    """Writes a run into a tracker's project; where that is, the tracker's own environment says.

    Raises:
        UserError: if there is no run, or the tracker is not installed.
    """
    with reaching(run):
        if not (run / run_files.CONFIG).is_file():
            raise UserError(f"'{run}' is not a run directory: it has no config.yaml")
        settings = flat_settings(read_config(str(run / run_files.CONFIG)))
        with on_disk(run / run_files.METRICS) as file:
            lines = read_metrics(Path(file))
    if not lines:
        raise UserError(f"the run in '{run}' has no metrics yet: export it once a stage has begun")
    write = {"wandb": _to_wandb, "mlflow": _to_mlflow}[tracker]
    write(_imported(tracker), project, run.name, settings, lines)
    say(f"export: {len(lines)} lines of metrics are in the {tracker} project '{project}'")


def _imported(tracker: str) -> Any:
    try:
        return importlib.import_module(tracker)
    except ImportError as error:
        raise UserError(
            f"export to {tracker} needs a package that is not installed ({error}): pip install "
            f"'lmcot[{tracker}]'"
        ) from None


def _to_wandb(
    wandb: Any,
    project: str,
    name: str,
    settings: Mapping[str, Any],
    lines: list[dict[str, Any]],
) -> None:
    with wandb.init(project=project, name=name, config=dict(settings)) as run:
        # Each stage counts steps of its own, which W&B would refuse as its one step.
        for stage in dict.fromkeys(line["stage"] for line in lines):
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        for line in lines:
            run.log({f"{line['stage']}/step": line["step"], **dict(_values(line))})


def _to_mlflow(
    mlflow: Any,
    project: str,
    name: str,
    settings: Mapping[str, Any],
    lines: list[dict[str, Any]],
) -> None:
    entities = importlib.import_module("mlflow.entities")
    mlflow.set_experiment(project)
    client = mlflow.MlflowClient()
    with mlflow.start_run(run_name=name) as run:
        params = [entities.Param(key, str(value)[:_LONGEST]) for key, value in settings.items()]
        for batch in _batches(params, 100):
            client.log_batch(run.info.run_id, params=batch)
        metrics = [
            entities.Metric(key, value, int(1000 * line.get("time", 0.0)), line["step"])
            for line in lines
            for key, value in _values(line)
        ]
        for batch in _batches(metrics, _BATCH):
            client.log_batch(run.info.run_id, metrics=batch)


def _values(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of a line below the name of its stage; what was not finite is left out."""
    for key, value in line.items():
        if key not in _KEYS and value is not None:
            yield f"{line['stage']}/{key}", value


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
