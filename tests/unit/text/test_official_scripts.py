"""The figures that official evaluation scripts print for the same answers."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers.data.metrics import squad_metrics

from lmcot.config.data import FileData
from lmcot.data import load_examples
from lmcot.data.tasks.task import EXTRACTIVE_QA, Scores
from lmcot.records import Example
from lmcot.text.answers import exact_match, f1

SAMPLE = Path(__file__).parents[3] / "lmcot/data/samples/hotpotqa-sample-validation.jsonl.gz"
OFFICIAL = yaml.safe_load(
    (Path(__file__).parent / "data" / "official_scripts.yaml").read_text(encoding="utf-8")
)
ROUNDED = {"squad": 1e-9, "musique": 0.05, "2wiki": 0.005}
"""How far a script's rounding may take its figures, in percent, from the exact ones."""


def scored(rows: Sequence[dict[str, Any]]) -> list[Scores]:
    found = []
    for row in rows:
        answer, *aliases = row["answers"]
        example = Example("q", "?", answer, (), aliases=tuple(aliases))
        found.append(EXTRACTIVE_QA.scores(row["prediction"], example))
    return found


def test_hotpotqas_script_on_predictions_for_its_own_questions() -> None:
    official = OFFICIAL["hotpotqa"]
    questions = load_examples(FileData(kind="file", path=str(SAMPLE))).examples
    asked = {one.id: one for one in questions if one.id in official["predictions"]}
    assert asked.keys() == official["predictions"].keys()
    scores = [EXTRACTIVE_QA.scores(text, asked[id]) for id, text in official["predictions"].items()]
    assert fmean(one.em for one in scores) == pytest.approx(official["printed"]["em"], abs=1e-12)
    assert fmean(one.f1 for one in scores) == pytest.approx(official["printed"]["f1"], abs=1e-12)


@pytest.mark.parametrize(
    ("part", "script"), [(part, script) for part in ("worded", "closed") for script in
                         OFFICIAL[part]["printed"]],
)  # fmt: skip
def test_scripts_that_take_the_best_over_aliases(part: str, script: str) -> None:
    printed, scores = OFFICIAL[part]["printed"][script], scored(OFFICIAL[part]["rows"])
    within = ROUNDED[script] * 1.001
    assert 100 * fmean(one.em for one in scores) == pytest.approx(printed["em"], abs=within)
    assert 100 * fmean(one.f1 for one in scores) == pytest.approx(printed["f1"], abs=within)


TEXTS = st.text(
    st.sampled_from([*"aAnthe yYso12éß北“\u2019\t\u00a0", *string.punctuation]), max_size=12
) | st.text(max_size=12)


@given(TEXTS, TEXTS)
def test_squads_script_as_transformers_has_it(prediction: str, gold: str) -> None:
    """Nothing but what docs/tasks.md names differs: a closed answer, and what is nothing once
    normalised."""
    closed = {"", "yes", "no", "noanswer"}
    normal = {squad_metrics.normalize_answer(one) for one in (prediction, gold)}
    if normal & closed:
        return
    assert exact_match(prediction, gold) == squad_metrics.compute_exact(gold, prediction)
    assert f1(prediction, gold) == squad_metrics.compute_f1(gold, prediction)
