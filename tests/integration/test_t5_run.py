"""Every stage through the command line, on random tiny T5s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lmcot.config.rows import ROWS, find_row
from lmcot.monitor.catalogue import CATALOGUE, describe
from lmcot.monitor.metrics import read_metrics
from tests.integration.command import Done, lmcot

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("cluster")]

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smoke_t5.yaml"
EVALUATED = [name for name, row in ROWS.items() if row.policy != "rejection"]
"""All rows but those of the stage that these settings leave out."""

LEFT_OUT = {
    "loss/answer", "loss/validation", "loss/validation_answer", "seconds/validate",
    "policy/dual_clip_fraction",
    "rejection/kept", "rejection/kept_share", "rejection/reward_kept", "rejection/sampled",
    "rejection/solved_share",
    *(name for name in CATALOGUE if name.startswith(("filter/", "curriculum/"))),
}  # fmt: skip
"""Metrics of what these settings leave out: distillation's validation and answers, the dual clip,
rejection sampling, the filter and the curriculum of refinement."""


def run(stage: str, run_dir: Path, *overrides: str) -> Done:
    return lmcot(stage, "--config", str(CONFIG), "--run-dir", str(run_dir), *overrides)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """A run of all stages, one by one."""
    run_dir = tmp_path_factory.mktemp("runs") / "t5"
    evaluated = (f"evaluate.rows=[{', '.join(EVALUATED)}]", "evaluate.samples=2")
    for stage in ("annotate", "distill", "refine", "evaluate"):
        done = run(stage, run_dir, *evaluated, "actors.rollout.count=1")
        assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    rationales = lines(finished / "rationales.jsonl")
    assert len(rationales) == 12
    kept = [r for r in rationales if r["kept"]]
    assert kept
    assert all(r["rationale"].endswith(f"So the answer is {r['answer']}.") for r in kept)
    assert all(r["reason"] for r in rationales)
    metrics = read_metrics(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics if m["stage"] == "refine"] == [1, 2]
    first = next(m for m in metrics if m["stage"] == "refine")
    assert abs(first["kl"]) < 1e-4, "[9] the reference is the policy at step 0"
    assert first["sampler/gap"] < 1e-3, "the sampler's log-probs are the learner's"
    aspects = {name for name in first if name.startswith("component/aspect/")}
    assert len(aspects) == 8
    for step in (1, 2):
        rollouts = lines(finished / "rollouts" / f"step-{step:06d}.jsonl")
        assert len(rollouts) == 4
        assert all(r["reward"] is not None and r["policy_version"] == step - 1 for r in rollouts)
    checkpoints = sorted(p.name for p in (finished / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-000001", "step-000002"]
    assert all((finished / "checkpoints" / name / "COMPLETE").exists() for name in checkpoints)
    events = EventAccumulator(str(finished / "tensorboard" / "refine"))
    events.Reload()
    assert "reward/mean" in events.Tags()["tensors"]
    text = (finished / "config.yaml").read_text(encoding="utf-8")
    assert "# torch: 2." in text
    assert "# commit: " in text
    assert "random:t5" in text
    assert (finished / "refine.png").stat().st_size > 1000


def test_every_metric_of_a_run_is_described_and_there_is_no_other(finished: Path) -> None:
    metrics = read_metrics(finished / "metrics.jsonl")
    logged = {name for line in metrics for name in line} - {"step", "stage", "time"}
    assert [name for name in logged if not describe(name)] == [], "see lmcot/monitor/catalogue.py"
    exact = {name for name in CATALOGUE if "*" not in name}
    assert exact - logged == LEFT_OUT, "described, but no run has them"


def test_the_report_has_every_row(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    rows = report["rows"]
    assert list(rows) == EVALUATED
    for name, row in rows.items():
        assert row["n"] == 4
        each = 2 if name.endswith("+sc") else 1
        assert set(row["ci"]) == {"em", "f1", "inclusion"}
        assert all(0 <= row[metric] <= 100 for metric in ("em", "f1", "inclusion"))
        asked = find_row(name).prompt is not None
        assert row["requests"] == (4 * each if asked else 0)
        assert (row["large_lm_tokens_in"] > 0) == asked
        assert (row["small_lm_tokens_out"] > 0) == (find_row(name).policy is not None)
        assert row["flops"] > 0
        assert row["seconds"] >= 0
        predictions = lines(finished / "predictions" / f"{name}.jsonl")
        assert len(predictions) == 4
        assert {len(one["votes"]) for one in predictions} == {each if each > 1 else 0}
    assert "refined" in rows["small_alone"]["label"]
    assert set(report["aspects"]) == {"base", "distilled", "refined"}
    assert all(len(scores) == 9 for scores in report["aspects"].values()), "eight, and n"
    pairs = [(test["first"], test["second"]) for test in report["tests"]]
    assert ("guided_refined", "standard") in pairs
    assert ("guided_refined", "guided_distilled") in pairs
    (line,) = [m for m in read_metrics(finished / "metrics.jsonl") if m["stage"] == "evaluate"]
    assert line["step"] == 2
    assert line["evaluation/guided_refined+sc/f1"] == rows["guided_refined+sc"]["f1"]
    for name in ("report.png", "report-cost.png", "report-aspects.png"):
        assert (finished / name).stat().st_size > 1000


def test_an_interrupted_evaluation_asks_what_is_missing(finished: Path, tmp_path: Path) -> None:
    """And ends as one that was not; on another run's data and policies too."""
    folder = finished / "predictions"
    kept = [folder / "guided_distilled+sc.jsonl", folder / "rationales" / "distilled+sc.jsonl"]
    before = {path: lines(path) for path in kept}
    for path in kept:
        whole = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(whole[:2]) + whole[2][:40], encoding="utf-8")
    others = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl") if p not in kept}
    done = lmcot(
        "evaluate", "--run-dir", str(finished), "evaluate.samples=2",
        "evaluate.rows=[guided_distilled+sc, guided_base]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "evaluate: 20/20 questions" in done.stderr
    for path in kept:
        for mine, theirs in zip(lines(path), before[path], strict=True):
            varying = ("seconds", "cached_requests")
            assert {k: v for k, v in mine.items() if k not in varying} == {
                k: v for k, v in theirs.items() if k not in varying
            }
    assert {p: p.stat().st_mtime_ns for p in others} == others

    done = lmcot(
        "evaluate", "--of", str(finished), "--run-dir", str(tmp_path / "other"),
        "data.max_validation=2", "evaluate.rows=[guided_refined]", "evaluate.aspect_questions=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "other" / "report.json").read_text(encoding="utf-8"))["rows"]
    assert row == "guided_refined"


def test_plain_transformers_loads_what_was_trained(finished: Path) -> None:
    weights = {}
    for name in ("distilled", "refined"):
        model = AutoModelForSeq2SeqLM.from_pretrained(finished / name)
        AutoTokenizer.from_pretrained(finished / name)
        weights[name] = model.get_input_embeddings().weight
    assert (weights["distilled"] - weights["refined"]).abs().max() > 0


def test_the_same_command_again_does_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    metrics = (finished / "metrics.jsonl").read_bytes()
    done = run("train", finished)
    assert done.returncode == 0, done.stderr
    for stage in ("annotate", "distill", "refine", "evaluate"):
        assert f"{stage}: " in done.stderr
        assert "done already" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before
    assert (finished / "metrics.jsonl").read_bytes() == metrics


def test_a_frozen_teacher_that_is_never_right_is_told_in_one_sentence(tmp_path: Path) -> None:
    run_dir = tmp_path / "frozen"
    done = run("annotate", run_dir, "teacher={kind: frozen}", "data.max_train=3")
    assert done.returncode == 2, done.stderr
    assert "lmcot: no rationale was kept" in done.stderr
    assert "Traceback" not in done.stderr
    rationales = lines(run_dir / "rationales.jsonl")
    assert [r["teacher"] for r in rationales] == ["frozen"] * 3
    assert all(r["reason"] and not r["kept"] for r in rationales)
