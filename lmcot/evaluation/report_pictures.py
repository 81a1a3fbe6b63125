"""The evaluation's pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lmcot.config.rows import Kind, find_row
from lmcot.config.stages import Colour
from lmcot.evaluation.costs import frontier, large_tokens
from lmcot.monitor.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    new_figure,
    save_figure,
    style,
)


def draw_pictures(report: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    """Draws the report's pictures; returns their file names by what they show."""
    pictures = {"Accuracy by row": "report.png"}
    _accuracy(report, run_dir / "report.png")
    name = "report-cost.png"
    (run_dir / name).unlink(missing_ok=True)
    if len(report["rows"]) > 1:
        _accuracy_by_cost(report, run_dir / name)
        pictures["Accuracy against the large LM's tokens"] = name
    name = "report-aspects.png"
    (run_dir / name).unlink(missing_ok=True)
    if report["aspects"]:
        _aspects(report["aspects"], run_dir / name)
        pictures["Rationales by aspect"] = name
    return pictures


def _accuracy(report: Mapping[str, Any], path: Path) -> None:
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
    counts = sorted({one["n"] for one in rows.values()})
    questions = " or ".join(map(str, counts))
    figure.suptitle(
        f"{questions} questions; lines: {100 * report['bootstrap']['confidence']:g}% intervals",
        fontsize=8,
        color=MUTED,
        x=0.995,
        ha="right",
    )
    save_figure(figure, path)


def _bars(axes: Axes, rows: Mapping[str, Mapping[str, Any]], metric: str) -> None:
    for position, (name, scores) in enumerate(rows.items()):
        value, (low, high) = scores[metric], scores["ci"][metric]
        axes.barh(position, value, height=0.62, color=_BARS[find_row(name).kind])
        axes.plot([low, high], [position, position], color=INK, linewidth=1.3)
        axes.plot([low, high], [position, position], color=INK, linestyle="", marker="|", ms=6)
        axes.text(
            max(value, high) + 1.2, position, f"{value:.1f}", va="center", fontsize=8, color=INK
        )
    # The right edge keeps room for the numbers beside the bars.
    top = max(max(one[metric], one["ci"][metric][1]) for one in rows.values())
    axes.set_xlim(0, max(10.0, 1.15 * top))


def _accuracy_by_cost(report: Mapping[str, Any], path: Path) -> None:
    """Accuracy against the tokens that the large LM reads and writes."""
    rows, costs = report["rows"], report["costs"]["rows"]
    figure = new_figure(9, 4.4)
    for index, (metric, title) in enumerate((("em", "Exact match"), ("f1", "F1"))):
        axes = figure.add_subplot(1, 2, index + 1)
        style(axes, grid="y")
        for name, scores in rows.items():
            tokens = large_tokens(costs[name])
            low, high = scores["ci"][metric]
            marker, color = find_row(name).marker, _COLOURS[find_row(name).colour]
            axes.plot([tokens, tokens], [low, high], color=color, linewidth=1.2, alpha=0.6)
            point = {"color": color, "ms": 7, "label": name, "clip_on": False}
            axes.plot([tokens], [scores[metric]], marker, **point)
        _frontier(axes, {n: (large_tokens(costs[n]), row[metric]) for n, row in rows.items()})
        axes.set_title(f"{title}, percent", fontsize=11, loc="left")
        axes.set_xlabel("large-LM tokens a question, in and out", fontsize=8, color=MUTED)
        top = max(max(one[metric], one["ci"][metric][1]) for one in rows.values())
        axes.set_ylim(0, max(10.0, 1.1 * top))
        axes.set_xlim(left=0)
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = min(4, len(names))
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    save_figure(figure, path)


def _frontier(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """A line over the rows that no cheaper row matches; controls know what no user knows."""
    open_to_users = {n: one for n, one in points.items() if find_row(n).kind != "control"}
    best = [open_to_users[name] for name in frontier(open_to_users)]
    if len(best) < 2:
        return
    end = (max(tokens for tokens, _ in points.values()), best[-1][1])
    axes.plot(
        *zip(*best, end, strict=True),
        drawstyle="steps-post",
        color=MUTED,
        linewidth=1.2,
        linestyle="--",
        zorder=1,
        label="frontier",
    )


_COLOURS: dict[Colour, str] = {
    "grey": GREY,
    "orange": ORANGE,
    "ink": INK,
    "purple": PURPLE,
    "blue": BLUE,
    "green": GREEN,
    "red": RED,
    "teal": TEAL,
}
_BARS: dict[Kind, str] = {"guided": BLUE, "alone": GREEN, "control": LIGHT, "unguided": GREY}


def _aspects(aspects: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Mean scores by aspect, a bar for each policy, least trained first."""
    names = [name for name in next(iter(aspects.values())) if name != "n"]
    figure = new_figure(9, 3.6)
    axes = figure.add_subplot(1, 1, 1)
    style(axes, grid="y")
    width = 0.8 / len(aspects)
    colors = {"base": LIGHT, "distilled": GREY, "refined": BLUE}
    for number, (policy, scores) in enumerate(aspects.items()):
        places = [at - 0.4 + (number + 0.5) * width for at in range(len(names))]
        heights = [scores[name] for name in names]
        axes.bar(places, heights, width=0.92 * width, color=colors.get(policy, GREEN), label=policy)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1)
    count = next(iter(aspects.values()))["n"]
    axes.set_title(f"Rationales by aspect, mean of {count:.0f}", fontsize=11, loc="left")
    figure.legend(loc="outside lower center", ncols=len(aspects), fontsize=8, frameon=False)
    save_figure(figure, path)
