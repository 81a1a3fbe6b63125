"""What a run leaves behind, as objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lmcot import run_files
from lmcot.config import Config, read_config
from lmcot.config.stages import TRAINED_POLICIES
from lmcot.errors import UserError
from lmcot.guide import Guide
from lmcot.storage import is_remote, place, reaching

if TYPE_CHECKING:
    from lmcot.storage import Place


class Table(list[dict[str, Any]]):
    """Records in the order of their file."""

    def to_pandas(self) -> Any:
        """The records as a `pandas.DataFrame`.

        Raises:
            UserError: if pandas is not installed.
        """
        return _pandas().DataFrame(list(self))


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One row of an evaluation: percentages, and totals over its questions."""

    name: str
    """The row's key, such as ``guided_refined``."""
    label: str
    """The row in words."""
    em: float
    """Exact match, in percent."""
    f1: float
    """Word F1, in percent."""
    inclusion: float
    """Answers that contain a right one, in percent."""
    n: int
    """Questions that were answered."""
    ci: Mapping[str, tuple[float, float]]
    """The confidence interval of each metric."""
    large_lm_tokens_in: int
    large_lm_tokens_out: int
    small_lm_tokens_in: int
    small_lm_tokens_out: int
    requests: int
    """Requests to the frozen LM."""
    seconds: float
    """Time that the row took."""
    values: Mapping[str, Any]
    """All that ``report.json`` says of the row."""


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation's report; a notebook shows it as ``report.md`` does."""

    rows: dict[str, ReportRow]
    """The rows by their names, in the order of the report."""
    tests: list[dict[str, Any]]
    """Paired comparisons between rows."""
    notes: list[str]
    """What is to be known of the results, such as questions that were left out."""
    markdown: str
    """The report as text."""

    def __getitem__(self, row: str) -> ReportRow:
        """A row by its name.

        Raises:
            UserError: if it was not evaluated.
        """
        if row not in self.rows:
            known = ", ".join(self.rows)
            raise UserError(
                f"the report has no row '{row}': evaluate it (evaluate.rows), or choose one of "
                f"{known}"
            )
        return self.rows[row]

    def __iter__(self) -> Iterator[ReportRow]:
        """The rows in the order of the report."""
        return iter(self.rows.values())

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with the plain fields of each row, by its name.

        Raises:
            UserError: if pandas is not installed.
        """
        plain = [one.name for one in fields(ReportRow) if one.name not in ("ci", "values")]
        records = []
        for row in self:
            record = {name: getattr(row, name) for name in plain}
            for metric, (low, high) in row.ci.items():
                record |= {f"{metric}_low": low, f"{metric}_high": high}
            records.append(record)
        return _pandas().DataFrame(records).set_index("name")

    def _repr_markdown_(self) -> str:
        return self.markdown


class Results:
    """A run directory: its settings, policies, metrics, rationales and report.

    Each is read when it is asked for; what a stage has not made yet is empty or None.
    """

    def __init__(self, run_dir: str | Place) -> None:
        """Opens the results of a run.

        Args:
            run_dir: a folder or a URL.

        Raises:
            UserError: if it is not a run directory, or a newer lmcot made it.
        """
        self.path = place(run_dir)
        with reaching(self.path):
            run_files.check_format(self.path)
            if not (self.path / run_files.CONFIG).is_file():
                raise UserError(f"'{self.path}' is not a run directory (it has no config.yaml)")

    def __repr__(self) -> str:
        """The call that opens the same results."""
        return f"lmcot.Results({str(self.path)!r})"

    @cached_property
    def settings(self) -> Config:
        """The settings that the run was last used with."""
        return read_config(self.path / run_files.CONFIG)

    @property
    def policies(self) -> dict[str, Place]:
        """Folders of the policies that are there, in Hugging Face's format, least trained first."""
        names = (*TRAINED_POLICIES, run_files.BEST)
        with reaching(self.path):
            return {
                name: self.path / name for name in names if run_files.holds_model(self.path / name)
            }

    @property
    def report(self) -> Report | None:
        """The evaluation's report; None if there is none yet."""
        text = self._text(run_files.REPORT_JSON)
        if text is None:
            return None
        found = json.loads(text)
        return Report(
            rows={name: _row(name, values) for name, values in found["rows"].items()},
            tests=found["tests"],
            notes=found.get("notes", []),
            markdown=self._text(run_files.REPORT_TEXT) or "",
        )

    @property
    def rationales(self) -> Table:
        """The teacher's rationales, kept and rejected, with the reason."""
        return self._table(run_files.RATIONALES)

    def metrics(self, stage: str | None = None) -> Table:
        """What was logged at each step.

        Args:
            stage: of this stage alone, such as ``refine``.
        """
        found = self._table(run_files.METRICS)
        return Table(one for one in found if stage in (None, one.get("stage")))

    def rollouts(self, step: int | None = None) -> Table:
        """The rationales of a step of refinement, with answers and rewards.

        Args:
            step: None: the last one.
        """
        folder = self.path / run_files.ROLLOUTS
        with reaching(self.path):
            steps = run_files.rollout_steps(folder)
        if not steps or step not in (None, *steps):
            return Table()
        name = run_files.rollouts_name(steps[-1] if step is None else step)
        return self._table(f"{run_files.ROLLOUTS}/{name}")

    def predictions(self, row: str) -> Table:
        """Prompts, answers and scores of an evaluation's row, question by question."""
        return self._table(f"{run_files.PREDICTIONS}/{run_files.predictions_name(row)}")

    def guide(self, policy: str | None = None, *, threads: int | None = None) -> Guide:
        """The trained pair, to answer questions in this process. See `Guide`."""
        return Guide(self.path, policy=policy, threads=threads)

    def _table(self, name: str) -> Table:
        """The lines of a file. A last line that a run in progress has not finished is left out."""
        *lines, _ = (self._text(name) or "").split("\n")
        try:
            return Table(json.loads(line) for line in lines)
        except ValueError as error:
            raise UserError(f"the file '{self.path / name}' is damaged ({error})") from None

    def _text(self, name: str) -> str | None:
        file = self.path / name
        with reaching(self.path):
            return file.read_text(encoding="utf-8") if file.is_file() else None

    def _repr_markdown_(self) -> str:
        report = self.report
        where = "" if is_remote(self.path) else f"Run directory `{self.path}`"
        return report.markdown if report is not None else where


def _row(name: str, values: Mapping[str, Any]) -> ReportRow:
    typed = {one.name for one in fields(ReportRow)} - {"name", "ci", "values"}
    return ReportRow(
        name=name,
        ci={metric: (low, high) for metric, (low, high) in values["ci"].items()},
        values=values,
        **{key: values[key] for key in typed},
    )


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError("to_pandas needs pandas: pip install pandas") from None
    return pandas
