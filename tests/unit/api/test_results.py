"""What a run leaves behind, as objects."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas
import pytest

import lmcot
from lmcot.config import dump_config, parse_config
from lmcot.evaluation.report import RowResult, write_report

CONFIG = parse_config(
    {
        "data": "a.jsonl",
        "policy": "random:llama",
        "frozen": "random:llama",
        "teacher": {"kind": "supporting_facts"},
    }
)


def row(name: str, em: list[float]) -> RowResult:
    ids = [str(number) for number in range(len(em))]
    return RowResult(
        name,
        f"the row {name}",
        ids,
        em,
        em,
        em,
        100,
        10,
        20,
        5,
        len(em),
        10**9,
        10**8,
        1.5,
        len(em),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with something of each file."""
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    rows = {name: row(name, em) for name, em in (("standard", [0.0, 1.0]), ("cot", [1.0, 1.0]))}
    write_report(
        tmp_path, rows, settings={}, bootstrap_samples=10, confidence=0.95, seed=0, notes=["two"]
    )
    lines = [{"stage": "distill", "step": 1}, {"stage": "refine", "step": 1, "kl": 0.5}]
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "ref')
    line = json.dumps({"rationale": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "rationales.jsonl").write_text(line + "\n", encoding="utf-8")
    (tmp_path / "rollouts").mkdir()
    for step in (1, 2):
        (tmp_path / "rollouts" / f"step-{step:06d}.jsonl").write_text(f'{{"reward": {step}}}\n')
    (tmp_path / "distilled").mkdir()
    (tmp_path / "distilled" / "config.json").write_text("{}")
    return tmp_path


def test_a_report_has_its_rows_as_objects(run: Path) -> None:
    report = lmcot.Results(run).report
    assert report is not None
    assert [(one.name, one.em, one.n) for one in report] == [
        ("standard", 50.0, 2),
        ("cot", 100.0, 2),
    ]
    assert report["standard"].ci["em"][0] <= 50.0 <= report["standard"].ci["em"][1]
    assert report["cot"].values["by"]["type"] == {}
    assert report.notes == ["two"]
    assert "the row cot" in report._repr_markdown_()
    with pytest.raises(lmcot.UserError, match="no row 'guided_base'"):
        report["guided_base"]


def test_a_report_becomes_a_data_frame(run: Path) -> None:
    report = lmcot.Results(run).report
    assert report is not None
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["cot", "em"] == 100.0
    assert frame.loc["standard", "em_low"] <= 50.0 <= frame.loc["standard", "em_high"]


def test_files_of_lines_are_tables(run: Path) -> None:
    found = lmcot.Results(str(run))
    assert [one["step"] for one in found.metrics()] == [1, 1], "a line in the making is left out"
    assert found.metrics("refine") == [{"stage": "refine", "step": 1, "kl": 0.5}]
    assert found.metrics("refine").to_pandas()["kl"].tolist() == [0.5]
    assert [one["rationale"] for one in found.rationales] == ["a\u2028b"]
    assert found.rollouts() == [{"reward": 2}]
    assert found.rollouts(1) == [{"reward": 1}]
    assert found.rollouts(3) == []
    assert found.predictions("cot") == []


def test_settings_and_policies(run: Path) -> None:
    found = lmcot.Results(run)
    assert found.settings == CONFIG
    assert found.policies == {"distilled": run / "distilled"}
    assert repr(found) == f"lmcot.Results({str(run)!r})"


def test_what_is_not_there_yet_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    found = lmcot.Results(tmp_path)
    assert found.report is None
    assert found.policies == {}
    assert found.rationales == []


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lmcot.UserError, match="is not a run directory"):
        lmcot.Results(tmp_path)


def test_a_damaged_line_is_named(run: Path) -> None:
    (run / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(lmcot.UserError, match=r"metrics\.jsonl' is damaged"):
        lmcot.Results(run).metrics()


def test_without_pandas_it_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(lmcot.UserError, match="pip install pandas"):
        lmcot.Results(run).metrics().to_pandas()
