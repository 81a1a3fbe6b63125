"""Metrics of a run: ``metrics.jsonl`` is the truth, the TensorBoard files are a view of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lmcot.files import write_atomically

_RESERVED = frozenset({"step", "stage", "time"})


class Monitor:
    """Writes what happens in a run directory; everything is on disk when a call returns.

    ``nonfinite`` counts the values that were NaN or infinite. One process writes at a time.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.metrics_path = run_dir / "metrics.jsonl"
        self.nonfinite = 0
        run_dir.mkdir(parents=True, exist_ok=True)
        _mend(self.metrics_path)
        self._file = self.metrics_path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """One line ``{"step", "stage", "time", **metrics}``, and scalars tagged ``stage/name``.

        The time is in seconds since the epoch. NaN and infinities become null, are counted, and
        stay out of TensorBoard.

        Raises:
            ValueError: if a metric is named step, stage or time.
        """
        if clash := _RESERVED & metrics.keys():
            raise ValueError(f"metrics cannot be named {', '.join(sorted(clash))}")
        values = {name: _finite(float(value)) for name, value in metrics.items()}
        self.nonfinite += sum(value is None for value in values.values())
        line = {"step": step, "stage": stage, "time": time.time(), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        _add_scalars(self._events, line)
        self._events.flush()

    def rollouts(self, step: int, lines: bytes) -> None:
        """Writes a step's rollouts, one JSON line each, to ``rollouts/step-NNNNNN.jsonl``."""
        write_atomically(self.run_dir / "rollouts" / f"step-{step:06d}.jsonl", lines)

    def truncate(self, stage: str, step: int) -> None:
        """Drops what the stage logged after ``step``, so that a resumed run logs it once.

        TensorBoard cannot forget single scalars, so its files are written anew from the lines
        that stay.
        """
        lines = read_metrics(self.metrics_path)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        if len(kept) == len(lines):
            return
        self.close()
        write_atomically(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
        folder = self.run_dir / "tensorboard"
        old = list(folder.glob("events.out.tfevents.*"))
        self._file = self.metrics_path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(folder))
        for line in kept:
            _add_scalars(self._events, line)
        self._events.flush()
        for path in old:
            path.unlink()

    def close(self) -> None:
        """Closes the files; the monitor logs no more."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, in the order written; none if there is no file.

    A last line that was cut by a kill is left out.
    """
    if not path.exists():
        return []
    *lines, tail = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in [*lines, *([tail] if _is_json(tail) else [])]]


def _mend(path: Path) -> None:
    """Ends the file with a whole line: a kill may have cut the last one."""
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


def _add_scalars(events: EventFileWriter, line: Mapping[str, Any]) -> None:
    values = [
        Summary.Value(tag=f"{line['stage']}/{name}", simple_value=value)
        for name, value in line.items()
        if name not in _RESERVED and value is not None
    ]
    summary = Summary(value=values)
    events.add_event(Event(wall_time=line["time"], step=line["step"], summary=summary))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
