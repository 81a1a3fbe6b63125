"""``lmcot aspects`` fits aspects to human labels and scores rationales, in this process alone.

Labels and rationales are JSON lines, gzipped or not: ``id`` (or ``question_id``), ``question``,
``context`` (or ``paragraphs``: ``{title, sentences}`` each, or plain strings), ``rationale``, and
for fitting true or false for each aspect, under the aspect's name or a mapped one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmcot.config import ASPECTS, Aspect, AspectSettings, Config, GuidanceRewards
from lmcot.data.formats import parse_record
from lmcot.data.layouts import read_records
from lmcot.data.prompts import PromptTemplates, load_templates
from lmcot.data.values import BadRecord
from lmcot.errors import UserError
from lmcot.files import write_atomically
from lmcot.frozen.open import open_frozen_lm
from lmcot.frozen.protocol import FrozenLM
from lmcot.monitor.progress import say
from lmcot.process import use_threads
from lmcot.records import Example, Failure
from lmcot.rewards.aspects import (
    JUDGE_MEASURES,
    ROSCOE_MEASURES,
    TEXT_MEASURES,
    AspectMeter,
    Columns,
)
from lmcot.rewards.component import Measured
from lmcot.rewards.first_check import check_frozen
from lmcot.rewards.learned import LearnedAspect, LearnedModel, load_learned, save_learned

Source = Literal["metrics", "judge", "learned"]
FEATURES: Mapping[str, tuple[str, ...]] = {
    "metrics": TEXT_MEASURES,
    "embeddings": (*TEXT_MEASURES, *ROSCOE_MEASURES),
    "all": (*TEXT_MEASURES, *ROSCOE_MEASURES, *JUDGE_MEASURES),
}
"""Sources of the features that a model is fitted on."""


@dataclass(frozen=True)
class Rationale:
    """One line of a file: a rationale, its example, and the line's other columns."""

    example: Example
    text: str
    columns: Mapping[str, Any]
    where: str
    """File and line, for errors."""


@dataclass(frozen=True)
class Judge:
    """A frozen LM and its prompts."""

    frozen: FrozenLM
    templates: PromptTemplates


def fit(
    labels: Path,
    output: Path,
    *,
    mapped: Mapping[str, str] | None = None,
    features: str = "metrics",
    config: Config | None = None,
    as_json: bool = False,
) -> LearnedModel:
    """Fits every aspect that has labels in the file, prints how well, and writes the model.

    An aspect whose labels do not do (of one class, or of too few questions) is left out and said.

    Args:
        mapped: for an aspect, the column of its labels; an aspect's own name otherwise.
        features: a key of `FEATURES`; ``all`` needs ``config``, whose frozen LM judges.
        as_json: a line of JSON in place of a line for each aspect.

    Raises:
        UserError: if the file or the settings are unsuitable, or no aspect can be fitted.
    """
    rationales = read_rationales(labels)
    columns = _label_columns(rationales, mapped or {})
    values = {a: _labels(rationales, a, column) for a, column in columns.items()}
    judge = _open_judge(config, "--features all") if features == "all" else None
    measured = measure(FEATURES[features], rationales, _rewards(config), judge)
    model = LearnedModel(
        features=FEATURES[features],
        frozen=judge.frozen.identity if judge else None,
        aspects=_fitted(measured, values, [one.example.id for one in rationales]),
    )
    _show(model, as_json=as_json)
    save_learned(model, output)
    return model


def score(
    rationales: Path,
    source: Source,
    *,
    model: Path | None = None,
    config: Config | None = None,
    output: Path | None = None,
) -> None:
    """Writes a line of JSON for each rationale, to ``output`` or the terminal: id and aspects.

    ``metrics`` measures fluency only with a ``config``, since that needs a frozen LM.

    Raises:
        UserError: if a file or setting is unsuitable, or the frozen LM fails.
    """
    read = read_rationales(rationales)
    rewards, needs_judge = _scoring(source, model, config)
    judge = _open_judge(config, f"--source {source}") if needs_judge else None
    meter = AspectMeter(rewards)
    rows = meter.measure(
        [one.example for one in read],
        [one.text for one in read],
        frozen=judge.frozen if judge else None,
        templates=judge.templates if judge else None,
    )
    lines = []
    for one, row in zip(read, rows, strict=True):
        names = [name.removeprefix("aspect/") for name in row]
        values = dict(zip(names, _values([*row.values()]), strict=True))
        lines.append(json.dumps({"id": one.example.id, **values}, ensure_ascii=False) + "\n")
    if output is None:
        sys.stdout.write("".join(lines))
    else:
        write_atomically(output, "".join(lines))


def read_rationales(path: Path) -> list[Rationale]:
    """The lines of a file of rationales.

    Raises:
        UserError: naming the line and field that is wrong.
    """
    found = [_rationale(record, where) for where, record in read_records(path)]
    if not found:
        raise UserError(f"'{path}' holds no rationales: give a file of JSON lines")
    return found


def measure(
    names: Sequence[str],
    rationales: Sequence[Rationale],
    rewards: GuidanceRewards,
    judge: Judge | None = None,
) -> dict[str, list[float]]:
    """Measures by name (`AspectMeter.columns`), one value a rationale.

    Raises:
        UserError: if the frozen LM fails on one.
    """
    columns: Columns = AspectMeter(rewards).columns(
        names,
        [one.example for one in rationales],
        [one.text for one in rationales],
        frozen=judge.frozen if judge else None,
        templates=judge.templates if judge else None,
    )
    return {name: _values(values) for name, values in columns.items()}


def _rationale(record: object, where: str) -> Rationale:
    if isinstance(record, BadRecord):
        raise UserError(f"{where}: {record}")
    if not isinstance(record, dict) or not isinstance(record.get("rationale"), str):
        raise UserError(f"{where}: a line must be a JSON object with the string 'rationale'")
    question = {
        "id": record.get("id", record.get("question_id")),
        "question": record.get("question"),
        "answer": "unknown",  # no measure uses it
        "context": record.get("context") or record.get("paragraphs"),
    }
    try:
        return Rationale(parse_record(question), record["rationale"], record, where)
    except BadRecord as error:
        raise UserError(f"{where}: {error}") from None


def _label_columns(rationales: Sequence[Rationale], mapped: Mapping[str, str]) -> dict[Aspect, str]:
    aspects = tuple(ASPECTS)
    for name in mapped:
        if name not in aspects:
            raise UserError(f"'{name}' is not an aspect: use one of {', '.join(aspects)}")
    held = {column for one in rationales for column in one.columns}
    found = {a: mapped.get(a, a) for a in aspects if a in mapped or a in held}
    if not found:
        raise UserError(
            "the file has no column with an aspect's name: name one with --label, for "
            "example --label factuality=COLUMN"
        )
    return found


def _labels(rationales: Sequence[Rationale], aspect: Aspect, column: str) -> list[bool]:
    for one in rationales:
        if not isinstance(one.columns.get(column), bool):
            raise UserError(
                f"{one.where}: '{column}', the label of {aspect}, must be true or false"
            )
    return [one.columns[column] for one in rationales]


def _fitted(
    measured: Mapping[str, Sequence[float]],
    labels: Mapping[Aspect, Sequence[bool]],
    questions: Sequence[str],
) -> dict[Aspect, LearnedAspect]:
    """Fits what can be fitted, and says what cannot."""
    import numpy as np

    from lmcot.rewards.aspect_fit import UnfitLabels, fit_aspect

    matrix = np.array(list(measured.values()), dtype=float).T
    fitted: dict[Aspect, LearnedAspect] = {}
    for aspect, values in labels.items():
        try:
            fitted[aspect] = fit_aspect(matrix, values, questions)
        except UnfitLabels as error:
            print(f"lmcot: {aspect} is not fitted: {error}", file=sys.stderr)
    if not fitted:
        raise UserError("no aspect could be fitted, and nothing is written: see the lines above")
    return fitted


def _show(model: LearnedModel, *, as_json: bool) -> None:
    """Prints how well each fitted aspect tells the labels of unseen questions apart."""
    if as_json:
        aspects = {
            name: {"auc": one.auc, "auc_interval": list(one.auc_interval)}
            for name, one in model.aspects.items()
        }
        print(json.dumps({"aspects": aspects}))
        return
    for name, one in model.aspects.items():
        low, high = one.auc_interval
        print(f"{name}: AUC {one.auc:.3f} [{low:.3f}, {high:.3f}] on unseen questions")


def _scoring(
    source: Source, model: Path | None, config: Config | None
) -> tuple[GuidanceRewards, bool]:
    """The settings of the measures, and whether they need a frozen LM."""
    aspects = list(ASPECTS)
    if source == "learned":
        if model is None:
            raise UserError("--source learned needs --model, the file of 'lmcot aspects fit'")
        learned = load_learned(model)
        aspects, needs_judge = list(learned.aspects), learned.frozen is not None
    elif source == "metrics":
        needs_judge = config is not None
        sources = ("text", "likelihood") if needs_judge else ("text",)
        aspects = [name for name, spec in ASPECTS.items() if spec.metric in sources]
    else:
        needs_judge = True
    update = {
        "aspects": dict.fromkeys(aspects, AspectSettings(source=source)),
        "learned_model": str(model) if model else None,
    }
    return _rewards(config).model_copy(update=update), needs_judge


def _rewards(config: Config | None) -> GuidanceRewards:
    if config is not None and isinstance(config.rewards, GuidanceRewards):
        return config.rewards
    return GuidanceRewards()


def _open_judge(config: Config | None, asked_by: str) -> Judge:
    if config is None or config.frozen is None:
        raise UserError(
            f"{asked_by} needs a frozen LM: give --config, a file with a 'frozen' section"
        )
    # Otherwise a library's warning would appear among the scores on standard output.
    use_threads(config.actors.frozen.threads)
    templates = load_templates(config.prompts.templates)
    checked = check_frozen(config, templates, "fit")
    for notice in checked.notices:
        say(notice)
    settings = checked.config.frozen or config.frozen
    return Judge(open_frozen_lm(settings, config.prompts), templates)


def _values(values: Sequence[Measured]) -> list[float]:
    """The values, if none is a failure."""
    good = [value for value in values if not isinstance(value, Failure)]
    failures = [value for value in values if isinstance(value, Failure)]
    if failures:
        raise UserError(
            f"the frozen LM failed {len(failures)} times, first with: {failures[0].reason}"
        )
    return good
