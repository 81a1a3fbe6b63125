"""The report: hand-computed numbers, intervals, and the three files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcot.evaluation.report import RowResult, write_report
from lmcot.evaluation.statistics import bootstrap_intervals


def row(name: str, em: list[float], f1: list[float] | None = None) -> RowResult:
    return RowResult(
        name=name,
        label=f"label of {name}",
        ids=[f"q{number}" for number in range(len(em))],
        em=em,
        f1=f1 if f1 is not None else em,
        inclusion=[1.0] * len(em),
        large_lm_tokens_in=12345,
        large_lm_tokens_out=67,
        small_lm_tokens_in=0,
        small_lm_tokens_out=0,
        requests=4,
        large=None,
        small=100,
        seconds=1.5,
        asked=len(em),
    )


def report(run_dir: Path, rows: dict[str, RowResult], **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "settings": {"seed": 0},
        "bootstrap_samples": 500,
        "confidence": 0.95,
        "seed": 0,
        "notes": ["a note"],
    }
    return write_report(run_dir, rows, **(options | changes))


def test_two_values_have_intervals_that_can_be_worked_out_by_hand() -> None:
    # The mean of two draws from {0, 1} is 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the 10% and
    # 90% points are 0 and 1, the 40% and 60% points both 1/2.
    values = {"em": [0.0, 1.0]}
    wide = bootstrap_intervals(values, samples=4000, confidence=0.8, seed=1)
    narrow = bootstrap_intervals(values, samples=4000, confidence=0.2, seed=1)
    assert wide == {"em": (0.0, 1.0)}
    assert narrow == {"em": (0.5, 0.5)}


def test_the_interval_is_the_normal_one_for_many_questions() -> None:
    # 100 of 400: standard error sqrt(0.25 * 0.75 / 400) = 0.02165, times 1.96 = 0.04244.
    values = {"em": [1.0] * 100 + [0.0] * 300}
    (low, high) = bootstrap_intervals(values, samples=4000, confidence=0.95, seed=2)["em"]
    assert low == pytest.approx(0.25 - 0.0424, abs=0.004)
    assert high == pytest.approx(0.25 + 0.0424, abs=0.004)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 1000))
def test_intervals_stay_inside_the_values_and_repeat_with_the_seed(
    values: list[float], seed: int
) -> None:
    first = bootstrap_intervals({"f1": values}, samples=50, confidence=0.9, seed=seed)
    again = bootstrap_intervals({"f1": values}, samples=50, confidence=0.9, seed=seed)
    assert first == again
    low, high = first["f1"]
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


@pytest.mark.parametrize("metrics", [{}, {"em": []}, {"em": [1.0], "f1": [1.0, 0.0]}])
def test_metrics_without_values_or_of_unequal_length_are_refused(
    metrics: dict[str, list[float]],
) -> None:
    with pytest.raises(ValueError, match="value"):
        bootstrap_intervals(metrics, samples=10, confidence=0.9, seed=0)


def test_the_json_holds_percentages_totals_and_intervals(tmp_path: Path) -> None:
    given_back = report(tmp_path, {"cot": row("cot", [1.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.5, 0.0])})
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored == given_back
    cot = stored["rows"]["cot"]
    assert (cot["em"], cot["f1"], cot["inclusion"], cot["n"]) == (25.0, 50.0, 100.0, 4)
    assert cot["ci"]["inclusion"] == [100.0, 100.0]
    assert cot["ci"]["em"][0] < 25.0 < cot["ci"]["em"][1]
    totals = ("large_lm_tokens_in", "large_lm_tokens_out", "requests", "flops", "seconds")
    assert [cot[key] for key in totals] == [12345, 67, 4, None, 1.5]
    assert stored["bootstrap"] == {"samples": 500, "confidence": 0.95, "seed": 0}
    assert (stored["settings"], stored["notes"]) == ({"seed": 0}, ["a note"])


def test_a_rows_interval_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    cot = row("cot", [1.0, 0.0, 1.0, 0.0, 0.0])
    alone = report(tmp_path, {"cot": cot})
    beside = report(tmp_path, {"standard": row("standard", [1.0, 0.0]), "cot": cot})
    assert alone["rows"]["cot"] == beside["rows"]["cot"]


def test_the_markdown_reads_well(tmp_path: Path) -> None:
    report(tmp_path, {"standard": row("standard", [1.0, 1.0])}, confidence=0.9)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    expected = (
        "| `standard` | label of standard | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] "
        "| 100.0 [100.0, 100.0] | 2 |"
    )
    assert expected in text
    assert "the 90% interval of the mean in percent, from 500 bootstrap resamples" in text
    assert "- a note" in text


def test_the_picture_is_there_and_no_partial_files_are(tmp_path: Path) -> None:
    rows = {name: row(name, [0.0, 0.0]) for name in ("standard", "guided_refined", "small_alone")}
    report(tmp_path, rows)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["report-cost.png", "report.json", "report.md", "report.png"]


def test_a_report_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row"):
        report(tmp_path, {})


def test_rows_are_compared_in_pairs_on_the_questions_in_common(tmp_path: Path) -> None:
    names = ("standard", "cot", "cot+sc", "guided_distilled", "guided_refined", "control_empty")
    rows = {name: row(name, [0.0] * 40) for name in names}
    rows["guided_refined"] = row("guided_refined", [1.0] * 20 + [0.0] * 20)
    rows["standard"] = replace(rows["standard"], ids=[f"q{n}" for n in range(10, 50)])
    tests = report(tmp_path, rows)["tests"]
    assert [(one["first"], one["second"]) for one in tests] == [
        ("cot", "standard"),
        ("cot+sc", "standard"), ("cot+sc", "cot"),
        ("guided_distilled", "standard"), ("guided_distilled", "cot"),
        ("guided_refined", "standard"), ("guided_refined", "cot"),
        ("guided_refined", "guided_distilled"),
        ("control_empty", "standard"),
    ]  # fmt: skip
    against_standard, _, against_distilled = tests[5:8]
    assert against_standard["n"] == 30, "q10 to q39"
    assert against_standard["em"]["difference"] == pytest.approx(100 / 3)
    assert against_distilled["em"]["difference"] == 50.0
    assert against_distilled["em"]["mcnemar"] == pytest.approx(2 / 2**20)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        "- `guided_refined` against `guided_distilled`: better by 50.0 points of EM (p = 0.002)"
        in text
    )
    assert "- `guided_distilled` against `standard`: no difference is shown (+0.0 points" in text


def test_few_questions_show_no_difference_whatever_its_size(tmp_path: Path) -> None:
    # Differences 1, -1, 0: s = 1, and 2.80159 * 100 / sqrt(3) = 161.7 points.
    rows = {
        "standard": row("standard", [0.0, 1.0, 0.0]),
        "guided_base": row("guided_base", [1.0, 0.0, 0.0]),
    }
    (test,) = report(tmp_path, rows)["tests"]
    assert test["em"]["detectable"] == pytest.approx(161.75, abs=0.01)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "These 3 questions cannot show any difference, however large." in text
    assert "| none |" in text
    assert "161" not in text


def test_guidance_without_the_passages_is_compared_with_answering_at_once(tmp_path: Path) -> None:
    """A table and a sentence tell what it costs; without such a row there is neither."""
    standard = replace(row("standard", [1.0, 0.0]), large_lm_tokens_in=2600)
    guided = replace(row("guided_base", [1.0, 1.0]), large_lm_tokens_in=2800)
    alone = replace(
        row("rationale_only_base", [1.0, 0.0]), large_lm_tokens_in=193, small_lm_tokens_in=2814,
    )  # fmt: skip
    both = {"standard": standard, "guided_base": guided}
    report(tmp_path, both)
    assert "`standard`'s, for a large LM" not in (tmp_path / "report.md").read_text("utf-8")
    report(tmp_path, {**both, "rationale_only_base": alone})
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "FLOPs of a question in percent of `standard`'s, for a large LM of:" in text
    # 130 of 1,333.5; 100 parameters read 1,407 tokens, and the large LM is spared 1,203.5.
    assert (
        "- `rationale_only_base` takes 130 tokens of the large LM, 10% of the 1,334 of `standard`: "
        "it is cheaper than that for a large LM of more than 117 parameters."
    ) in text
    assert "`guided_base` takes" not in text


def test_what_the_rest_of_the_report_tells(tmp_path: Path) -> None:
    """Groups of questions, rationales, aspects and costs."""
    cot = replace(
        row("cot", [1.0, 0.0, 0.0]), types=["bridge", "comparison", "bridge"], levels=["hard"] * 3
    )
    guided = replace(
        row("guided_base", [1.0, 1.0, 0.0]), types=["bridge", "comparison", "bridge"],
        contains_gold=[1.0, 0.0, 1.0], copied=[0.5, 0.25, 0.0], shares=[1.0, 0.6, 0.8],
        large_lm_tokens_in=3000, large_lm_tokens_out=30, small_lm_tokens_in=600,
    )  # fmt: skip
    scores = {"base": {"fluency": 0.75, "factuality": 0.5, "n": 3.0}}
    given = report(tmp_path, {"cot": cot, "guided_base": guided}, aspects=scores)
    by_type = given["rows"]["guided_base"]["by"]["type"]
    assert by_type["bridge"] == {"n": 2, "em": 50.0, "f1": 50.0, "inclusion": 100.0}
    assert given["rows"]["cot"]["by"]["level"]["hard"]["n"] == 3
    assert given["rows"]["cot"]["contains_gold"] is None
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| `guided_base` | 67% | 25% | 80% |" in text
    assert "| base | 0.75 | 0.50 | 3 |" in text
    assert "| row | bridge (n = 2) | comparison (n = 1) |" in text
    assert "| `cot` | 50.0 / 50.0 | 0.0 / 0.0 |" in text
    assert "By level" not in text, "all are of one"
    # 100 parameters read 200 tokens a question; the large LM is spared 4137.33 - 1010.
    assert "cheaper than chain of thought by a large LM of more than 6 parameters" in text
    for name in ("report.png", "report-cost.png", "report-aspects.png"):
        assert f"({name})" in text
        assert (tmp_path / name).stat().st_size > 1000
    report(tmp_path, {"cot": cot})
    assert not (tmp_path / "report-aspects.png").exists(), "of the report before"
