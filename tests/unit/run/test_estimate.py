"""What a run is expected to take, by hand-computed numbers, and how the report compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmcot.config import Config, dump_config, parse_config
from lmcot.errors import UserError
from lmcot.evaluation.report_text import _estimate
from lmcot.run.estimate import Taken, compared, estimate, record, taken_by, units_of

LEAST = {
    "data": {
        "train": {"kind": "counting", "examples": 10},
        "validation": {"kind": "counting", "examples": 4},
    },
    "policy": {"source": "random:counting-llama"},
    "frozen": {"backend": "transformers", "source": "random:counting-llama"},
    "teacher": {"kind": "frozen"},
    "refine": {"steps": 10, "prompts_per_step": 4, "samples_per_prompt": 2},
    "evaluate": {"rows": ["standard", "guided_refined"]},
    "actors": {"learner": {"gpus": 1}, "frozen": {"count": 2, "gpus": 1}},
}


def settings(**changes: Any) -> Config:
    return parse_config({**LEAST, **changes})


def earlier(folder: Path, **changes: Any) -> str:
    """A run of 5 steps, whose files say what it took."""
    folder.mkdir()
    config = settings(**changes)
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [
        {"step": 1, "stage": "distill", "seconds/learn": 5.0},
        {"step": 1, "stage": "distill", "seconds/validate": 5.0, "loss": None},
        *(
            {"step": step, "stage": "refine", "seconds/step": 16.0, "frozen/tokens": 800.0,
             "speed/frozen": 100.0}
            for step in range(1, 6)
        ),
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    rationales = [{"example_id": f"q{number}"} for number in range(5)]
    (folder / "rationales.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rationales))
    (folder / "spending.json").write_text(json.dumps({"annotate": {"tokens": 1000}}))
    row = {"n": 4, "seconds": 8.0, "large_lm_tokens_in": 90, "large_lm_tokens_out": 10}
    (folder / "report.json").write_text(json.dumps({"rows": {"standard": row}}))
    return str(folder)


def test_units_are_what_each_stage_counts() -> None:
    assert units_of(settings(), 10, 4) == {
        "annotate": 10, "distill": 10, "refine": 80, "evaluate": 8,
    }  # fmt: skip
    bare = settings(teacher=None, refine={**LEAST["refine"], "start_from": "base"})  # type: ignore[dict-item]
    assert set(units_of(bare, 10, 4)) == {"refine", "evaluate"}


def test_what_a_run_took_is_read_from_its_files(tmp_path: Path) -> None:
    run = Path(earlier(tmp_path / "run"))
    assert taken_by(run, settings()) == {
        "annotate": Taken(5, 1000 / 200, 1000),
        "distill": Taken(5, 10.0),
        "refine": Taken(40, 80.0, 4000.0),
        "evaluate": Taken(4, 8.0, 100),
    }


def test_an_estimate_is_units_times_what_a_unit_took(tmp_path: Path) -> None:
    prices = {"per_hour": {"learner": 3.0, "frozen": 2.0}, "per_million_tokens": 1000.0}
    config = settings(estimate={"like": earlier(tmp_path / "run"), **prices})
    found = estimate(config, 10, 4)
    assert found is not None
    refine = found.stages["refine"]
    assert (refine.units, refine.seconds, refine.frozen_tokens) == (80, 160.0, 8000.0)
    assert refine.gpu_hours == pytest.approx(3 * 160 / 3600)
    assert refine.cost == pytest.approx((3 + 2 * 2) * 160 / 3600 + 8)
    assert found.stages["distill"].seconds == 20.0
    assert found.stages["evaluate"].frozen_tokens == 200
    assert found.notices == ()
    last = found.describe().splitlines()[-1].split()
    assert last[0] == "all"
    assert last[-2] == "10,200"


def test_other_numbers_of_actors_are_counted_and_told(tmp_path: Path) -> None:
    run = earlier(tmp_path / "run")
    actors = {**LEAST["actors"], "frozen": {"count": 1, "gpus": 1}}  # type: ignore[dict-item]
    found = estimate(settings(estimate={"like": run}, actors=actors), 10, 4)
    assert found is not None
    assert found.stages["refine"].seconds == 320.0
    assert any("refine: the numbers of actors differ" in told for told in found.notices)


def test_other_rows_of_an_evaluation_are_told(tmp_path: Path) -> None:
    run = earlier(tmp_path / "run")
    found = estimate(settings(estimate={"like": run}, evaluate={"rows": ["cot"]}), 10, 4)
    assert found is not None
    assert any("evaluate: the earlier run has other rows" in told for told in found.notices)


def test_given_rates_replace_measured_ones() -> None:
    rates = {"refine": {"seconds": 2.0, "frozen_tokens": 10.0}}
    found = estimate(settings(estimate={"rates": rates}), 10, 4)
    assert found is not None
    assert set(found.stages) == {"refine"}
    assert found.stages["refine"].seconds == 160.0
    assert any("distill: no rate is known" in told for told in found.notices)
    with pytest.raises(UserError, match="no rate of any stage"):
        estimate(settings(estimate={}), 10, 4)
    with pytest.raises(UserError, match="is not a run directory"):
        estimate(settings(estimate={"like": "/no/such/run"}), 10, 4)


def test_the_report_tells_how_far_the_estimate_was_off(tmp_path: Path) -> None:
    config = settings(estimate={"rates": {"refine": {"seconds": 1.0, "frozen_tokens": 150.0}}})
    run = Path(earlier(tmp_path / "run"))
    record(run, config, 10, 4)
    kept = (run / "estimate.json").read_text()
    other = settings(estimate={"rates": {"refine": {"seconds": 9.0}}})
    record(run, other, 10, 4)
    assert (run / "estimate.json").read_text() == kept, "what was foretold first counts"
    found = compared(run, config, Taken(8, 1.0))
    assert found["stages"]["refine"]["estimated"]["seconds"] == 80.0
    assert found["stages"]["refine"]["taken"]["seconds"] == 80.0
    assert "| refine | 0.0222 | 0.0222 | +0% | 12,000 | 4,000 | +200% |" in _estimate(found)
    assert compared(run, settings(), Taken(8, 1.0)) == {}
    assert _estimate({}) == ""
