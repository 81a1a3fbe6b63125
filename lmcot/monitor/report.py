"""The evaluation's report: ``report.json`` for machines, ``report.md`` and ``report.png``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lmcot.files import write_atomically
from lmcot.monitor.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    MUTED,
    new_figure,
    save_figure,
    style,
)
from lmcot.monitor.statistics import bootstrap_intervals

METRICS = ("em", "f1", "inclusion")


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row of the evaluation gave: 0..1 for each question, and totals over all of them."""

    name: str
    """The row's key, such as ``guided_refined``."""
    label: str
    """What was run, for people: names the policy where that is not plain from the row."""
    em: list[float]
    f1: list[float]
    inclusion: list[float]
    large_lm_tokens_in: int
    large_lm_tokens_out: int
    small_lm_tokens_in: int
    small_lm_tokens_out: int
    requests: int
    """Requests to the frozen LM."""
    flops: float | None
    """Floating-point operations of both models; None where a model's size is not known."""
    seconds: float


def write_report(
    run_dir: Path,
    rows: Mapping[str, RowResult],
    *,
    settings: Mapping[str, Any],
    bootstrap_samples: int,
    confidence: float,
    seed: int,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes ``report.json``, ``report.md`` and ``report.png``; gives back what the JSON holds.

    Scores and intervals are in percent, times in seconds.

    Raises:
        ValueError: if there are no rows, or a row's metrics are empty or differ in length.
    """
    if not rows:
        raise ValueError("a report needs at least one row")
    report = {
        "rows": {
            name: _summary(row, bootstrap_samples, confidence, seed) for name, row in rows.items()
        },
        "bootstrap": {"samples": bootstrap_samples, "confidence": confidence, "seed": seed},
        "settings": dict(settings),
        "notes": list(notes),
    }
    write_atomically(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_atomically(run_dir / "report.md", _markdown(report))
    _picture(report, run_dir / "report.png")
    return report


def _summary(row: RowResult, samples: int, confidence: float, seed: int) -> dict[str, Any]:
    metrics = {name: [100 * value for value in getattr(row, name)] for name in METRICS}
    intervals = bootstrap_intervals(metrics, samples=samples, confidence=confidence, seed=seed)
    n = len(row.em)
    return {
        "label": row.label,
        **{name: sum(values) / n for name, values in metrics.items()},
        "n": n,
        "ci": {name: list(interval) for name, interval in intervals.items()},
        "large_lm_tokens_in": row.large_lm_tokens_in,
        "large_lm_tokens_out": row.large_lm_tokens_out,
        "small_lm_tokens_in": row.small_lm_tokens_in,
        "small_lm_tokens_out": row.small_lm_tokens_out,
        "requests": row.requests,
        "flops": row.flops,
        "seconds": row.seconds,
    }


def _markdown(report: Mapping[str, Any]) -> str:
    lines = [
        "# Evaluation",
        "",
        "| row | what | EM | F1 | inclusion | n | large-LM tokens in / out | seconds |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for name, row in report["rows"].items():
        scores = " | ".join(_score(row, metric) for metric in METRICS)
        tokens = f"{row['large_lm_tokens_in']:,} / {row['large_lm_tokens_out']:,}"
        label = row["label"].replace("|", "\\|")
        lines.append(
            f"| `{name}` | {label} | {scores} | {row['n']} | {tokens} | {row['seconds']:,.1f} |"
        )
    bootstrap = report["bootstrap"]
    lines += [
        "",
        f"In brackets: the {_level(bootstrap)} interval of the mean in percent, from "
        f"{bootstrap['samples']:,} bootstrap resamples of the questions; it covers the choice of "
        "questions, not that of the training seed.",
    ]
    if report["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report["notes"])]
    lines += ["", "![EM and F1 by row](report.png)", ""]
    return "\n".join(lines)


def _score(row: Mapping[str, Any], metric: str) -> str:
    low, high = row["ci"][metric]
    return f"{row[metric]:.1f} [{low:.1f}, {high:.1f}]"


def _level(bootstrap: Mapping[str, Any]) -> str:
    return f"{100 * bootstrap['confidence']:g}%"


def _picture(report: Mapping[str, Any], path: Path) -> None:
    rows = report["rows"]
    figure = new_figure(9, 1.3 + 0.42 * len(rows))
    positions = range(len(rows))
    for index, (metric, title) in enumerate((("em", "Exact match"), ("f1", "F1"))):
        axes = figure.add_subplot(1, 2, index + 1)
        style(axes, grid="x")
        _bars(axes, rows, metric)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("percent", fontsize=8, color=MUTED)
        axes.set_yticks(positions, list(rows) if index == 0 else [""] * len(rows), fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.invert_yaxis()
    counts = sorted({row["n"] for row in rows.values()})
    questions = " or ".join(map(str, counts))
    figure.suptitle(
        f"{questions} questions; lines: {_level(report['bootstrap'])} intervals",
        fontsize=8,
        color=MUTED,
        x=0.995,
        ha="right",
    )
    save_figure(figure, path)


def _bars(axes: Axes, rows: Mapping[str, Mapping[str, Any]], metric: str) -> None:
    for position, (name, row) in enumerate(rows.items()):
        value, (low, high) = row[metric], row["ci"][metric]
        axes.barh(position, value, height=0.62, color=_color(name))
        axes.plot([low, high], [position, position], color=INK, linewidth=1.3)
        axes.plot([low, high], [position, position], color=INK, linestyle="", marker="|", ms=6)
        axes.text(
            max(value, high) + 1.2, position, f"{value:.1f}", va="center", fontsize=8, color=INK
        )
    # The right edge keeps room for the numbers beside the bars.
    top = max(max(row[metric], row["ci"][metric][1]) for row in rows.values())
    axes.set_xlim(0, max(10.0, 1.15 * top))


def _color(name: str) -> str:
    if name.startswith("guided"):
        return BLUE
    if name.startswith("small"):
        return GREEN
    return LIGHT if name.startswith("control") else GREY
