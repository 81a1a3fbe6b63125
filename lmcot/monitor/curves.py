"""The training curves of a stage as one picture."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lmcot.monitor.figures import MUTED, PALETTE, new_figure, save_figure, style
from lmcot.monitor.metrics import read_metrics


@dataclass(frozen=True)
class Panel:
    """One plot: its title, and shell patterns of the metrics that belong in it."""

    title: str
    patterns: tuple[str, ...]


PANELS = (
    Panel("Reward", ("reward/mean",)),
    Panel("Reward components", ("component/*",)),
    Panel("KL to the reference policy", ("kl",)),
    Panel("Value loss", ("loss/value",)),
    Panel("Explained variance of the value", ("value/explained_variance",)),
    Panel("Response length (tokens)", ("response/length",)),
    Panel("Loss", ("loss", "loss/answer", "loss/validation*", "loss/policy")),
    Panel("Entropy (nats per token)", ("policy/entropy",)),
)
"""The panels, in the order drawn; a metric goes to the first panel that matches it."""

Series = list[tuple[int, float]]


def plot_training(metrics_path: Path, output: Path, stage: str = "refine") -> None:
    """Draws the curves of a stage from ``metrics.jsonl`` as a PNG.

    Panels without a metric and values that were not finite are left out; if nothing was logged at
    all, the picture says so.
    """
    series = _series(metrics_path, stage)
    panels = _assign(series)
    columns = min(len(panels), 4 if len(panels) > 6 else 3) or 1
    rows = -(-len(panels) // columns) or 1
    figure = new_figure(4.2 * columns, 2.9 * rows)
    for index, (panel, names) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        style(axes, grid="y")
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        for number, name in enumerate(names):
            _draw(axes, series[name], _label(name), PALETTE[number % len(PALETTE)])
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False, ncols=2 if len(names) > 3 else 1)
    if not panels:
        figure.text(0.5, 0.5, f"nothing logged for '{stage}' yet", ha="center", color=MUTED)
    save_figure(figure, output)


def _series(metrics_path: Path, stage: str) -> dict[str, Series]:
    series: dict[str, Series] = {}
    for line in read_metrics(metrics_path):
        if line["stage"] != stage:
            continue
        for name, value in line.items():
            if name not in ("step", "stage", "time") and value is not None:
                series.setdefault(name, []).append((line["step"], value))
    return series


def _assign(series: dict[str, Series]) -> list[tuple[Panel, list[str]]]:
    left = sorted(series)
    assigned = []
    for panel in PANELS:
        names = [name for name in left if any(fnmatchcase(name, p) for p in panel.patterns)]
        left = [name for name in left if name not in names]
        if names:
            assigned.append((panel, names))
    return assigned


def _draw(axes: Axes, points: Series, label: str, color: str) -> None:
    """Draws the points as a line; a long one is faint, with its running mean in full colour."""
    steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    window = len(values) // 20
    if window < 2:
        marker = "o" if len(values) < 25 else ""
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, ms=3, label=label)
        return
    sums = np.cumsum(np.insert(values, 0, 0.0))
    starts = np.maximum(np.arange(len(values)) + 1 - window, 0)
    ends = np.arange(len(values)) + 1
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
    axes.plot(
        steps, (sums[ends] - sums[starts]) / (ends - starts), color=color, lw=1.8, label=label
    )


def _label(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")
