"""Every stage through the command line, on random tiny T5s; then the same run interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lmcot.monitor.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smoke_t5.yaml"


def command(stage: str, run_dir: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "lmcot.cli", stage,
        "--config", str(CONFIG), "--run-dir", str(run_dir), *overrides,
    ]  # fmt: skip


def run(stage: str, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(stage, run_dir, *overrides), cwd=ROOT, capture_output=True, text=True, check=False
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    """A run's PPO metrics without the timings, and what the frozen LM's cache saved."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time", "seconds/", "frozen/"))}
        for line in read_metrics(run_dir / "metrics.jsonl")
        if line["stage"] == "refine"
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages."""
    run_dir = tmp_path_factory.mktemp("runs") / "t5"
    done = run("train", run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.e2e
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
    assert first["sampler_gap"] < 1e-3, "the sampler's log-probs are the learner's"
    aspects = {name for name in first if name.startswith("component/aspect/")}
    assert len(aspects) == 8
    for step in (1, 2):
        rollouts = lines(finished / "rollouts" / f"step-{step:06d}.jsonl")
        assert len(rollouts) == 4
        assert all(r["reward"] is not None and r["policy_version"] == step - 1 for r in rollouts)
    checkpoints = sorted(p.name for p in (finished / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-000001", "step-000002"]
    assert all((finished / "checkpoints" / name / "COMPLETE").exists() for name in checkpoints)
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert "refine/reward/mean" in events.Tags()["scalars"]
    text = (finished / "config.yaml").read_text(encoding="utf-8")
    assert "# torch: 2." in text
    assert "# commit: " in text
    assert "random:t5" in text
    assert (finished / "refine.png").stat().st_size > 1000


@pytest.mark.e2e
def test_the_report_has_every_row(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    rows = report["rows"]
    assert list(rows) == [
        "standard", "cot", "guided_base", "guided_distilled", "guided_refined", "small_alone",
    ]  # fmt: skip
    for name, row in rows.items():
        assert row["n"] == 4
        assert set(row["ci"]) == {"em", "f1", "inclusion"}
        assert all(0 <= row[metric] <= 100 for metric in ("em", "f1", "inclusion"))
        asked = name != "small_alone"
        assert row["requests"] == (4 if asked else 0)
        assert (row["large_lm_tokens_in"] > 0) == asked
        assert (row["small_lm_tokens_out"] > 0) == (name not in ("standard", "cot"))
        assert row["flops"] > 0
        assert row["seconds"] >= 0
        assert len(lines(finished / "predictions" / f"{name}.jsonl")) == 4
    assert "refined" in rows["small_alone"]["label"]
    assert (finished / "report.png").stat().st_size > 1000


@pytest.mark.e2e
def test_plain_transformers_loads_what_was_trained(finished: Path) -> None:
    weights = {}
    for name in ("distilled", "refined"):
        model = AutoModelForSeq2SeqLM.from_pretrained(finished / name)
        AutoTokenizer.from_pretrained(finished / name)
        weights[name] = model.get_input_embeddings().weight
    assert (weights["distilled"] - weights["refined"]).abs().max() > 0


@pytest.mark.e2e
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


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the step is logged."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        metrics = read_metrics(run_dir / "metrics.jsonl")
        if any(m["stage"] == "refine" and m["step"] >= step for m in metrics):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not logged within 240 s")


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


FOUR_STEPS = ("refine.start_from=base", "refine.steps=4")


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four PPO steps without an interruption."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = run("refine", run_dir, *FOUR_STEPS)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.e2e
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_ends_where_one_in_one_go_ends(
    in_one_go: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """[29] N + M steps in one go equal N steps, an interruption, M steps."""
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command("refine", broken, *FOUR_STEPS), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(broken, 2, process)
    family = children_of(process)
    os.kill(process.pid, how)
    errors = process.communicate(timeout=120)[1]
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "the same command goes on from here" in errors
        _, alive = psutil.wait_procs(family, timeout=30)
    else:
        alive = family  # nobody was there to end them: they end by themselves, or are ended here
        psutil.wait_procs(family, timeout=15)
        for survivor in psutil.wait_procs(family, timeout=0)[1]:
            survivor.kill()
        alive = psutil.wait_procs(family, timeout=10)[1]
    assert not alive, f"left running: {alive}"
    done = run("refine", broken, *FOUR_STEPS)
    assert done.returncode == 0, done.stderr
    assert "refine: goes on after step" in done.stderr
    assert comparable(broken) == comparable(in_one_go)
    for step in range(1, 5):
        name = f"step-{step:06d}.jsonl"
        assert lines(broken / "rollouts" / name) == lines(in_one_go / "rollouts" / name)


@pytest.mark.e2e
def test_a_frozen_teacher_that_is_never_right_is_told_in_one_sentence(tmp_path: Path) -> None:
    run_dir = tmp_path / "frozen"
    done = run("annotate", run_dir, "teacher={kind: frozen}", "data.max_train=3")
    assert done.returncode == 2, done.stderr
    assert "lmcot: no rationale was kept" in done.stderr
    assert "Traceback" not in done.stderr
    rationales = lines(run_dir / "rationales.jsonl")
    assert [r["teacher"] for r in rationales] == ["frozen"] * 3
    assert all(r["reason"] and not r["kept"] for r in rationales)
