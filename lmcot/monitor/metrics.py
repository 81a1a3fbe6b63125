"""A run's metrics: ``metrics.jsonl`` is the record, the TensorBoard files are a view of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcot import run_files
from lmcot.config import MonitorSettings
from lmcot.files import read_lines, write_atomically
from lmcot.monitor.alarms import Alarms
from lmcot.monitor.board import Board
from lmcot.monitor.progress import say
from lmcot.monitor.ray_metrics import RayMetrics

EVALUATION = "evaluation"
"""The stage of evaluation during refinement, and the prefix of rows' names in any stage."""
_RESERVED = frozenset({"step", "stage", "time"})


class Monitor:
    """Writes a run's metrics into its directory; everything is on disk when a call returns.

    ``nonfinite`` counts the values that were NaN or infinite. One process writes at a time.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: MonitorSettings | None = None,
        *,
        hparams: Mapping[str, Any] | None = None,
        varied: Collection[str] = (),
    ) -> None:
        """Makes the directory if it is missing.

        Args:
            hparams: all settings of the run by their keys, for TensorBoard to compare.
            varied: those of them whose values differ in the runs beside it, if that is known.
        """
        self.run_dir = run_dir
        self.metrics_path = run_dir / run_files.METRICS
        self.settings = settings or MonitorSettings()
        self.nonfinite = 0
        run_dir.mkdir(parents=True, exist_ok=True)
        _end_with_whole_line(self.metrics_path)
        self._file = self.metrics_path.open("a", encoding="utf-8")
        self._board = Board(run_dir / run_files.TENSORBOARD)
        if hparams is not None:
            self._board.settings(hparams, varied)
        self._alarms: dict[str, Alarms] = {}
        self._ray = RayMetrics(run_dir.name) if self.settings.ray_metrics else None

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Writes a line ``{"step", "stage", "time", **metrics}``, scalars in TensorBoard, Ray
        metrics.

        Alarms that the metrics raise are said, and are metrics themselves. The time is in seconds
        since the epoch. NaN and infinities become null, are counted, and stay out of the views.

        Raises:
            ValueError: if a metric is named step, stage or time.
        """
        if clash := _RESERVED & metrics.keys():
            raise ValueError(f"metrics cannot be named {', '.join(sorted(clash))}")
        values = {name: _finite(float(value)) for name, value in metrics.items()}
        self.nonfinite += sum(value is None for value in values.values())
        states, raised = self._alarms_of(stage).look(values)
        values.update(states)
        line = {"step": step, "stage": stage, "time": time.time(), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._board.scalars(line)
        for text in raised:
            say(f"{stage}: step {step}: alarm: {text}")
        if raised:
            self._board.text(stage, step, "alarms", "\n".join(f"- {text}" for text in raised))
        self._board.flush()
        if self._ray is not None:
            self._ray.log(step, stage, values)

    def histograms(self, step: int, stage: str, values: Mapping[str, Sequence[float]]) -> None:
        """Adds histograms of a step's numbers to TensorBoard; they are on disk with the next
        `log`."""
        for name, numbers in values.items():
            self._board.histogram(stage, step, name, numbers)

    def text(self, step: int, stage: str, name: str, markdown: str) -> None:
        """Adds text to TensorBoard; it is on disk with the next `log`."""
        self._board.text(stage, step, name, markdown)

    def evaluation(
        self,
        step: int,
        rows: Mapping[str, Mapping[str, float]],
        *,
        stage: str = EVALUATION,
        others: Mapping[str, float] | None = None,
    ) -> None:
        """Logs evaluation rows of the policy after ``step``, as ``evaluation/ROW/METRIC``.

        Args:
            others: metrics that are logged with them, by their whole names.
        """
        named = {
            f"{EVALUATION}/{row}/{metric}": value
            for row, metrics in rows.items()
            for metric, value in metrics.items()
        }
        self.log(step, stage, {**named, **(others or {})})

    def rollouts(self, step: int, lines: bytes) -> None:
        """Writes a step's rollouts, one JSON line each, to ``rollouts/step-NNNNNN.jsonl``."""
        path = self.run_dir / run_files.ROLLOUTS / run_files.rollouts_name(step)
        write_atomically(path, lines, private=True)

    def truncate(self, stage: str, step: int) -> None:
        """Drops what the stage logged after ``step``, so that a resumed run logs it once.

        The TensorBoard view is rewritten, since a kill may have cut it; alarms are as they were.
        """
        lines = read_metrics(self.metrics_path)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        if len(kept) < len(lines):
            self._file.close()
            write_atomically(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = self.metrics_path.open("a", encoding="utf-8")
        stays = [line for line in kept if line["stage"] == stage]
        self._board.rewrite(stage, step, stays)
        self._alarms.pop(stage, None)
        for line in stays:
            self._alarms_of(stage).look(_metrics(line))

    def close(self) -> None:
        """Closes the files; nothing can be logged afterwards."""
        self._file.close()
        self._board.close()

    def _alarms_of(self, stage: str) -> Alarms:
        return self._alarms.setdefault(stage, Alarms(self.settings.alarms))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, in the order written; none if there is no file.

    A last line that was cut by a kill is left out.

    Raises:
        UserError: if another line is damaged; it is named.
    """
    remedy = "delete that line; only its step's metrics are lost"
    return read_lines(path, remedy, needed=("step", "stage"))


def _end_with_whole_line(path: Path) -> None:
    """Ends the file with a whole line, since a kill may have cut the last one."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if not text or text.endswith("\n"):
        return
    whole, _, tail = text.rpartition("\n")
    lines = [line for line in (whole, tail if _is_json(tail) else "") if line]
    write_atomically(path, "".join(line + "\n" for line in lines))


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _metrics(line: Mapping[str, Any]) -> dict[str, float | None]:
    """The logged metrics, without the keys that the monitor added."""
    return {
        name: value
        for name, value in line.items()
        if name not in _RESERVED and not name.startswith("alarm/")
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
