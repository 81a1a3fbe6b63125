"""Compares runs: their reports side by side, and paired differences on their common questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcot import run_files
from lmcot.config import Config, flat_settings, parse_config, read_yaml_mapping
from lmcot.config.rows import ROWS
from lmcot.errors import UserError
from lmcot.evaluation.predictions import Prediction, row_result
from lmcot.evaluation.report import RowResult, compare_rows
from lmcot.files import write_atomically
from lmcot.storage import reaching
from lmcot.text.characters import markdown_cell

if TYPE_CHECKING:
    from lmcot.storage import Place

_METRICS = (("em", "EM"), ("f1", "F1"))
_SHOWN = 40
"""Largest number of differing settings shown; the others are only counted."""


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """An evaluated run."""

    name: str
    report: dict[str, Any]
    rows: dict[str, RowResult]
    questions: dict[str, tuple[str, str]]
    """Text and gold answer of each question by id."""
    config: Config | None


def compare(
    paths: Sequence[Place], *, markdown: Path | None = None, output: Path | None = None
) -> dict[str, Any]:
    """Prints the runs side by side; the others are compared with the first one.

    Args:
        markdown, output: files for the same as Markdown and as JSON.

    Returns:
        ``runs``, ``settings`` (by key, a value for each run), ``rows`` (by name, a summary for each
        run, null where it has no such row) and ``tests`` (see `compare_rows`; ``run`` is whose).

    Raises:
        UserError: if a run has no report, or the runs were evaluated on different data.
    """
    if len(paths) < 2:
        raise UserError("lmcot compare needs two runs or more")
    runs = []
    for path in paths:
        with reaching(path):
            runs.append(_read(path))
    for run in runs[1:]:
        _check_same_data(runs[0], run)
    found = {
        "runs": [run.name for run in runs],
        "settings": _differing(runs),
        "rows": {
            row: [run.report["rows"].get(row) for run in runs]
            for row in ROWS
            if any(row in run.rows for run in runs)
        },
        "tests": [
            {"run": run.name, "row": row, **test}
            for run in runs[1:]
            for row, test in _tests(runs[0], run).items()
        ],
    }
    text = _text(found)
    print(text, end="")
    if markdown is not None:
        write_atomically(markdown, text)
    if output is not None:
        write_atomically(output, json.dumps(found, indent=2) + "\n")
    return found


def _read(path: Place) -> _Evaluated:
    run_files.check_format(path)
    file = path / run_files.REPORT_JSON
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        rows, questions = {}, {}
        for row in report["rows"]:
            predictions = _predictions(
                path / run_files.PREDICTIONS / run_files.predictions_name(row)
            )
            label = report["rows"][row]["label"]
            rows[row] = row_result(row, label, predictions, large=None, small=0)
            questions.update({one.id: (one.question, one.gold) for one in predictions})
    except FileNotFoundError as error:
        raise UserError(
            f"'{path}' has no evaluation to compare ({error.filename or file} is missing): run "
            f"'lmcot evaluate --run-dir {path}' first"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the evaluation in '{path}' cannot be read ({error}): it is damaged, or of another "
            f"version of lmcot; run 'lmcot evaluate --run-dir {path}' again"
        ) from None
    config = path / run_files.CONFIG
    settings = parse_config(read_yaml_mapping(config)) if config.exists() else None
    return _Evaluated(str(path), report, rows, questions, settings)


def _predictions(path: Place) -> list[Prediction]:
    lines = path.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    return [Prediction(**{k: v for k, v in one.items() if k != "made_with"}) for one in records]


def _check_same_data(first: _Evaluated, other: _Evaluated) -> None:
    common = first.questions.keys() & other.questions.keys()
    if not common:
        raise UserError(
            f"'{first.name}' and '{other.name}' were evaluated on other data: their "
            f"{len(first.questions)} and {len(other.questions)} questions have none in common"
        )
    for key in sorted(common):
        if first.questions[key] != other.questions[key]:
            raise UserError(
                f"'{first.name}' and '{other.name}' were evaluated on other data: question {key} "
                f"is {first.questions[key]} in the one and {other.questions[key]} in the other"
            )


def _tests(first: _Evaluated, other: _Evaluated) -> dict[str, dict[str, Any]]:
    """Differences between the other run's rows and the first run's, for rows that both have."""
    how = first.report["bootstrap"]
    found = {}
    for row, mine in other.rows.items():
        theirs = first.rows.get(row)
        if theirs is not None and set(mine.ids) & set(theirs.ids):
            test = compare_rows(mine, theirs, how["samples"], how["confidence"], how["seed"])
            found[row] = {k: v for k, v in test.items() if k not in ("first", "second")}
    return found


def _differing(runs: Sequence[_Evaluated]) -> dict[str, list[Any]]:
    """The settings that differ between runs; runs without recorded settings are ignored."""
    settings = [{} if run.config is None else flat_settings(run.config) for run in runs]
    kept = [one for one in settings if one]
    keys = dict.fromkeys(key for one in kept for key in one)
    return {
        key: [one.get(key) for one in settings]
        for key in keys
        if any(one.get(key) != kept[0].get(key) for one in kept)
    }


def _text(found: Mapping[str, Any]) -> str:
    letters = [chr(ord("A") + number) for number in range(len(found["runs"]))]
    lines = ["# Runs", ""]
    lines += [f"- {letter}: {name}" for letter, name in zip(letters, found["runs"], strict=True)]
    if found["settings"]:
        lines += ["", "## Settings that differ", "", f"| setting | {' | '.join(letters)} |"]
        lines.append(f"|---|{'---|' * len(letters)}")
        for key, values in list(found["settings"].items())[:_SHOWN]:
            lines.append(f"| `{key}` | {' | '.join(_cell(value) for value in values)} |")
        more = len(found["settings"]) - _SHOWN
        if more > 0:
            lines += ["", f"and {more} more"]
    for metric, title in _METRICS:
        lines += ["", f"## {title}, percent", ""]
        lines.append(f"| row | {' | '.join(letters)} |")
        lines.append(f"|---|{'---|' * len(letters)}")
        for row, summaries in found["rows"].items():
            lines.append(f"| `{row}` | {' | '.join(_score(one, metric) for one in summaries)} |")
    letter_of = dict(zip(found["runs"], letters, strict=True))
    if found["tests"]:
        lines += [
            "", "## Differences, paired on the questions in common", "",
            "| row | runs | n | EM, points | p | McNemar's p | F1, points | p |",
            "|---|---|---:|---|---:|---:|---|---:|",
        ]  # fmt: skip
    for test in found["tests"]:
        em, f1 = test["em"], test["f1"]
        lines.append(
            f"| `{test['row']}` | {letter_of[test['run']]} - A | {test['n']} | {_points(em)} "
            f"| {em['p']:.3f} | {em['mcnemar']:.3f} | {_points(f1)} | {f1['p']:.3f} |"
        )
    lines += ["", "## Costs of a question", ""]
    lines.append(f"| row | {' | '.join(letters)} |")
    lines.append(f"|---|{'---|' * len(letters)}")
    for row, summaries in found["rows"].items():
        lines.append(f"| `{row}` | {' | '.join(_cost(one) for one in summaries)} |")
    lines += ["", "Large-LM tokens in and out, small-LM tokens in and out, seconds."]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else markdown_cell(f"`{value}`")


def _score(summary: Mapping[str, Any] | None, metric: str) -> str:
    if summary is None:
        return ""
    low, high = summary["ci"][metric]
    return f"{summary[metric]:.1f} [{low:.1f}, {high:.1f}]"


def _points(one: Mapping[str, float]) -> str:
    return f"{one['difference']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}]"


def _cost(summary: Mapping[str, Any] | None) -> str:
    if summary is None or not summary["n"]:
        return ""
    n = summary["n"]
    numbers = [
        summary[f"{size}_lm_tokens_{way}"] / n
        for size in ("large", "small")
        for way in ("in", "out")
    ]
    return "{:,.0f} / {:,.0f}, {:,.0f} / {:,.0f}, {:.2f} s".format(*numbers, summary["seconds"] / n)
