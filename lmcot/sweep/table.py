"""The results of a sweep's trials: `sweep.json` is the record, `sweep.md` a view of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lmcot import run_files
from lmcot.errors import UserError
from lmcot.files import read_object, write_atomically
from lmcot.sweep.space import SweepSettings, Trial
from lmcot.sweep.trial import running_means, steps_done
from lmcot.text.characters import markdown_cell

Status = Literal["unfinished", "finished", "stopped early", "failed"]


@dataclass
class TrialRow:
    """A trial and its results so far."""

    trial: str
    values: dict[str, Any]
    status: Status = "unfinished"
    reason: str | None = None
    """Reason of the failure, if it failed."""
    seconds: float = 0.0
    """Wall-clock seconds, including actor start-up."""
    steps: int = 0
    last: float | None = None
    """The averaged metric after the last step."""
    best: float | None = None
    """The best value of the averaged metric."""
    kl: float | None = None
    """KL to the reference policy, at the last step."""


class SweepTable:
    """The rows of all trials, by number."""

    def __init__(self, run_dir: Path, sweep: SweepSettings, trials: list[Trial]) -> None:
        """Reads the record of an earlier call of the same sweep.

        Raises:
            UserError: if that was another sweep.
        """
        self.folder = run_dir / "trials"
        self._record = run_dir / run_files.SWEEP
        self._view = run_dir / "sweep.md"
        self._sweep = sweep
        self._trials = {trial.number: trial for trial in trials}
        self.rows = {trial.number: TrialRow(trial.name, trial.values) for trial in trials}
        names = {field.name for field in fields(TrialRow)}
        for number, before in enumerate(self._recorded(), 1):
            row = self.rows.get(number)
            if row is None or _as_json(row.values) != before["values"]:
                raise UserError(
                    f"the sweep in '{run_dir}' began with other trials ('{before['trial']}' is not "
                    "among them now): set 'space', 'seed' and 'trials' back, or start again with "
                    "another --run-dir"
                )
            self.rows[number] = TrialRow(**{key: before[key] for key in names - {"values"}},
                                    values=row.values)  # fmt: skip
        for number, row in self.rows.items():
            self._measure(number)
            steps = self._trials[number].config.refine.steps
            if row.status == "finished" and row.steps < steps:
                row.status = "unfinished"  # refine.steps was raised

    def _recorded(self) -> list[dict[str, Any]]:
        remedy = "put it back from a copy, or use another --run-dir"
        rows = read_object(self._record, remedy).get("trials", [])
        known = {field.name for field in fields(TrialRow)} - {"values"}
        if not all(isinstance(row, dict) and known <= row.keys() for row in rows):
            raise UserError(
                f"the file '{self._record}' is damaged (a trial is incomplete): {remedy}"
            )
        return sorted(rows, key=lambda row: str(row["trial"]))

    def numbers(self, *statuses: Status) -> list[int]:
        """Numbers of the trials with these statuses, in order."""
        return [number for number, row in self.rows.items() if row.status in statuses]

    def record(self, number: int, status: Status, reason: str | None, seconds: float) -> TrialRow:
        """Records a trial's results, or how long an unfinished one ran."""
        row = self.rows[number]
        row.status, row.reason = status, reason
        row.seconds += seconds
        self._measure(number)
        self.write()
        return row

    def best(self) -> int | None:
        """The best of the trials that finished; None if none did."""
        ranked = [n for n in self._ranked() if self.rows[n].status == "finished"]
        return ranked[0] if ranked else None

    def record_of_all(self) -> dict[str, Any]:
        """What the record holds of all trials, best one first, as plain values."""
        return {
            "metric": self._sweep.metric,
            "mode": self._sweep.mode,
            "average_over": self._sweep.average_over,
            "trials": [_as_json(asdict(self.rows[number])) for number in self._ranked()],
        }

    def write(self) -> None:
        """Writes the record and the view."""
        write_atomically(self._record, json.dumps(self.record_of_all(), indent=1) + "\n")
        write_atomically(self._view, self.markdown())

    def markdown(self) -> str:
        """The table, best trial first; below it why trials failed."""
        sweep = self._sweep
        metric = f"{sweep.metric} ({sweep.mode}, over {sweep.average_over} steps)"
        head = ["trial", *(f"`{key}`" for key in sweep.space), "steps", f"{metric}, last", "best",
                "KL", "status", "seconds"]  # fmt: skip
        lines = [head, ["---"] * len(head)]
        for number in self._ranked():
            row = self.rows[number]
            values = [_shown(value) for value in row.values.values()]
            measured = [_shown(value) for value in (row.last, row.best, row.kl)]
            lines.append(
                [f"{number:04d}", *values, str(row.steps), *measured, row.status,
                 f"{row.seconds:.0f}"]
            )  # fmt: skip
        failed = [
            f"- trial {number:04d} failed: {self.rows[number].reason}"
            for number in self.numbers("failed")
        ]
        table = [f"| {' | '.join(cells)} |" for cells in lines]
        return "\n".join([*table, *(["", *failed] if failed else [])]) + "\n"

    def _ranked(self) -> list[int]:
        """Numbers from the best metric to the worst; those without one last."""
        sign = -1.0 if self._sweep.mode == "max" else 1.0

        def key(number: int) -> tuple[bool, float, int]:
            last = self.rows[number].last
            return last is None, sign * (last or 0.0), number

        return sorted(self.rows, key=key)

    def _measure(self, number: int) -> None:
        row = self.rows[number]
        folder = self.folder / row.trial
        steps = steps_done(folder)
        if not steps:
            return
        means = running_means(folder, self._sweep)
        finite = [value for value in means if math.isfinite(value)]
        row.steps = len(steps)
        row.last = means[-1] if math.isfinite(means[-1]) else None
        row.best = (max if self._sweep.mode == "max" else min)(finite, default=None)
        row.kl = steps[-1].get("kl")


def _as_json(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else markdown_cell(str(value))
