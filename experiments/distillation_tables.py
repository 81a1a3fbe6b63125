"""The Markdown tables of docs/distillation.md, from the results of `experiments.distillation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def tables(results: Sequence[Result]) -> str:
    """All tables."""
    lines = ["| run | rows: EM / F1 | s |", "|---|---|---:|"]
    for result in results:
        rows = result.get("rows", {})
        cells = ", ".join(f"`{n}` {r['em']:.1f} / {r['f1']:.1f}" for n, r in rows.items())
        lines.append(f"| {result['name']} | {cells} | {result['seconds']} |")
    return "\n".join(lines)
