"""The evaluation's report: ``report.json`` for machines, ``report.md`` and pictures for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmcot.config.rows import find_row
from lmcot.evaluation.costs import costs, flops
from lmcot.evaluation.report_pictures import draw_pictures
from lmcot.evaluation.report_text import markdown
from lmcot.evaluation.statistics import bootstrap_intervals, mcnemar, paired_difference
from lmcot.files import write_atomically

METRICS = ("em", "f1", "inclusion")


@dataclass(frozen=True, slots=True)
class RowResult:
    """The result of one row: scores of each question, 0 to 1, and totals over all questions."""

    name: str
    """The row's key, such as ``guided_refined``."""
    label: str
    """The row in words; names the policy where the row's name does not."""
    ids: list[str]
    """Ids of the questions that were answered; all lists are in their order."""
    em: list[float]
    f1: list[float]
    inclusion: list[float]
    large_lm_tokens_in: int
    large_lm_tokens_out: int
    small_lm_tokens_in: int
    small_lm_tokens_out: int
    requests: int
    """Requests to the frozen LM."""
    large: int | None
    """The frozen LM's parameters; None if unknown."""
    small: int
    seconds: float
    asked: int
    """Number of questions, including those that failed."""
    cached_requests: float = 0.0
    types: list[str] = field(default_factory=list)
    levels: list[str] = field(default_factory=list)
    contains_gold: list[float] = field(default_factory=list)
    """Whether the small LM's rationales hold the gold answer; empty for rows without them."""
    copied: list[float] = field(default_factory=list)
    """Shares of the rationales' words that are copied from the context."""
    shares: list[float] = field(default_factory=list)
    """Shares of the votes that are for the answer; empty for rows without votes."""
    empty: int = 0
    """Number of answered questions whose reply ended without an answer."""
    cut: int = 0
    """Number of answered questions whose reply was cut before it said its answer."""


def write_report(
    run_dir: Path,
    rows: Mapping[str, RowResult],
    *,
    settings: Mapping[str, Any],
    bootstrap_samples: int,
    confidence: float,
    seed: int,
    notes: Sequence[str] = (),
    aspects: Mapping[str, Mapping[str, float]] | None = None,
    estimate: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes ``report.json``, ``report.md`` and its pictures; returns the content of the JSON.

    Scores, differences and intervals are in percent, times in seconds.

    Args:
        aspects: mean aspect scores (0 to 1) of each policy's rationales, and ``n``.
        estimate: what the run was expected to take, beside what it took.

    Raises:
        ValueError: if there are no rows, or a row's metrics are empty or differ in length.
    """
    if not rows:
        raise ValueError("a report needs at least one row")
    summaries = {
        name: _summary(row, bootstrap_samples, confidence, seed) for name, row in rows.items()
    }
    first = next(iter(rows.values()))
    report = {
        "rows": summaries,
        "tests": _tests(rows, bootstrap_samples, confidence, seed),
        "costs": costs(
            summaries, first.small, first.large, {name: row.asked for name, row in rows.items()}
        ),
        "aspects": {name: dict(scores) for name, scores in (aspects or {}).items()},
        "bootstrap": {"samples": bootstrap_samples, "confidence": confidence, "seed": seed},
        "settings": dict(settings),
        "notes": list(notes),
        **({"estimate": dict(estimate)} if estimate else {}),
    }
    write_atomically(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    pictures = draw_pictures(report, run_dir)
    if (run_dir / "refine.png").exists():
        pictures["Reward and KL over training"] = "refine.png"
    write_atomically(run_dir / "report.md", markdown(report, pictures))
    return report


def _summary(row: RowResult, samples: int, confidence: float, seed: int) -> dict[str, Any]:
    metrics = {name: [100 * value for value in getattr(row, name)] for name in METRICS}
    intervals = bootstrap_intervals(metrics, samples=samples, confidence=confidence, seed=seed)
    large_tokens = row.large_lm_tokens_in + row.large_lm_tokens_out
    small_tokens = row.small_lm_tokens_in + row.small_lm_tokens_out
    return {
        "label": row.label,
        **{name: _mean(values) for name, values in metrics.items()},
        "n": len(row.em),
        "empty": row.empty,
        "cut": row.cut,
        "ci": {name: list(interval) for name, interval in intervals.items()},
        "large_lm_tokens_in": row.large_lm_tokens_in,
        "large_lm_tokens_out": row.large_lm_tokens_out,
        "small_lm_tokens_in": row.small_lm_tokens_in,
        "small_lm_tokens_out": row.small_lm_tokens_out,
        "requests": row.requests,
        "cached_requests": round(row.cached_requests, 3),
        "flops": flops(row.large, large_tokens, row.small, small_tokens),
        "seconds": row.seconds,
        "contains_gold": _percent(row.contains_gold),
        "copied": _percent(row.copied),
        "vote_share": _percent(row.shares),
        "by": {
            "type": _groups(row.types, metrics),
            "level": _groups(row.levels, metrics),
        },
    }


def _groups(labels: Sequence[str], metrics: Mapping[str, list[float]]) -> dict[str, Any]:
    """Means by a label of the questions, those without one left out."""
    found = {}
    for name in sorted(set(labels) - {""}):
        members = [index for index, label in enumerate(labels) if label == name]
        means = {key: _mean([values[i] for i in members]) for key, values in metrics.items()}
        found[name] = {"n": len(members), **means}
    return found


def _tests(
    rows: Mapping[str, RowResult], samples: int, confidence: float, seed: int
) -> list[dict[str, Any]]:
    """Paired comparisons on the questions that both rows answered."""
    return [
        compare_rows(rows[first], rows[second], samples, confidence, seed)
        for first in rows
        for second in find_row(first).against
        if second in rows and set(rows[first].ids) & set(rows[second].ids)
    ]


def compare_rows(
    first: RowResult, second: RowResult, samples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """The paired tests between two rows (see `paired_difference` and `mcnemar`), in points.

    Raises:
        ValueError: if no question was answered in both.
    """
    places = {key: place for place, key in enumerate(second.ids)}
    pairs = [(index, places[key]) for index, key in enumerate(first.ids) if key in places]
    found: dict[str, Any] = {"first": first.name, "second": second.name, "n": len(pairs)}
    for metric in METRICS:
        mine = [100 * getattr(first, metric)[i] for i, _ in pairs]
        theirs = [100 * getattr(second, metric)[j] for _, j in pairs]
        difference = paired_difference(
            mine, theirs, samples=samples, confidence=confidence, seed=seed
        )
        found[metric] = {key: value for key, value in asdict(difference).items() if key != "n"}
    found["em"]["mcnemar"] = mcnemar(
        [first.em[i] for i, _ in pairs], [second.em[j] for _, j in pairs]
    )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(values: Sequence[float]) -> float | None:
    return 100 * _mean(values) if values else None
