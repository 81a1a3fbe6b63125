"""The Markdown tables of docs/distillation.md, from the results of `experiments.distillation`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def tables(results: Sequence[Result]) -> str:
    """All tables for which there are results."""
    parts = [
        ("Guided", _rows_table(results, "guided/")),
        ("Prompts", _rows_table(results, "prompts/")),
        ("Runs", _runs_table(results)),
    ]
    return "\n".join(f"### {title}\n\n{table}\n" for title, table in parts if table)


def _rows_table(results: Sequence[Result], prefix: str) -> str:
    """EM and F1 of each run's rows, a column for each row that any of them has."""
    of_kind = [one for one in results if one["name"].startswith(prefix) and one.get("rows")]
    if not of_kind:
        return ""
    columns = list(dict.fromkeys(name for one in of_kind for name in one["rows"]))
    lines = [_line(["run", "n", *(f"`{name}`" for name in columns)])]
    lines.append(_line(["---", "---:", *("---" for _ in columns)]))
    for one in of_kind:
        rows = one["rows"]
        number = max(row["n"] for row in rows.values())
        cells = [_score(rows[name]) if name in rows else "" for name in columns]
        lines.append(_line([one["name"].removeprefix(prefix), str(number), *cells]))
    return "\n".join(lines)


def _score(row: Mapping[str, Any]) -> str:
    low, high = row["ci"]["em"]
    return f"{row['em']:.1f} [{low:.0f}, {high:.0f}] / {row['f1']:.1f}"


def _runs_table(results: Sequence[Result]) -> str:
    """Where the time went, by commit."""
    lines = [_line(["run", "commands", "commit", "seed", "minutes", "load"])]
    lines.append(_line(["---", "---", "---", "---:", "---:", "---"]))
    for one in results:
        begin, end = one["load"]
        commands = ", ".join(f"`{command}`" for command in one["commands"])
        minutes, load = f"{one['seconds'] / 60:.1f}", f"{begin:.0f} to {end:.0f}"
        cells = [one["name"], commands, f"`{one['commit']}`", str(one["seed"]), minutes, load]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
