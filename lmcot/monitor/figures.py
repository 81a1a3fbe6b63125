"""The style of lmcot's pictures, and how they are saved. No display is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID = "#22303c", "#7b8794", "#e4e8ec"
BLUE, ORANGE, GREEN, PURPLE = "#2f6fb3", "#dd8b2e", "#3c9d6d", "#8a63b8"
RED, TEAL, GREY, LIGHT = "#c8504f", "#2aa1a8", "#a5afb9", "#d5dbe0"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, drawn off screen."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03)
    return Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")


def style(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Gives axes the common style; ``grid`` is the axis (``x`` or ``y``) whose lines are drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=3)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG through a temporary file, so that it is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
