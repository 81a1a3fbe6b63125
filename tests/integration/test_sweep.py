"""Sweeps with the real Ray Tune: trials that finish, are stopped early, fail, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from lmcot.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, main
from lmcot.config import load_config
from lmcot.monitor.metrics import read_metrics
from lmcot.sweep import sweep as stage

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
RAY_RESULTS = Path("~/ray_results").expanduser()
RATE = "refine.optimiser.learning_rate"
SETTINGS = (
    "refine.prompts_per_step=4",
    "refine.samples_per_prompt=4",
    "actors.prompts_per_unit=4",
    "actors.rollout={count: 1, cpus: 0.25}",
    "actors.reward.cpus=0.25",
    "actors.learner.cpus=0.25",
    "learner.max_skipped_updates=0",
    "checkpoints.every=1",
)
SOON_S = 600.0


def command(folder: Path, steps: int, space: dict[str, Any], **settings: Any) -> list[str]:
    """What follows `lmcot` on the command line."""
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump({"space": space, "driver_cpus": 0.25, **settings}))
    config = str(ROOT / "configs" / "toy.yaml")
    return ["sweep", "--config", config, "--space", str(file), "--run-dir", str(folder / "run"),
            f"refine.steps={steps}", *SETTINGS]  # fmt: skip


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the record, by the trials' numbers."""
    record = json.loads((folder / "run" / "sweep.json").read_text())
    return {row["trial"][:4]: row for row in record["trials"]}


def steps_logged(folder: Path) -> list[int]:
    """Steps of the only trial."""
    files = list(folder.glob("run/trials/*/metrics.jsonl"))
    return [line["step"] for line in read_metrics(files[0])] if files else []


def wait_for_step(folder: Path, step: int, driver: subprocess.Popen[str]) -> None:
    """Waits until the only trial has come so far."""
    deadline = time.monotonic() + SOON_S
    while len(steps_logged(folder)) < step:
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.02)


@pytest.fixture
def room_for_one() -> Iterator[None]:
    """A cluster with room for one trial's bundles and not one more actor."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_trials_finish_or_are_stopped_early_or_fail(
    room_for_one: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All actors are in the trial's placement group: outside it there is no CPU for them."""
    had_results = RAY_RESULTS.exists()
    arguments = command(
        tmp_path,
        4,
        {RATE: {"grid": [1e30, 3e-3, 1e-9]}},
        metric="kl",  # unlike the reward, it tells the rates apart for sure
        average_over=2,
        asha={"grace_steps": 2, "reduction_factor": 2},
    )
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    found = rows(tmp_path)
    assert [(found[n]["status"], found[n]["steps"]) for n in ("0002", "0003")] == [
        ("finished", 4),
        ("stopped early", 2),
    ]
    assert found["0001"]["status"] == "failed"
    assert "loss or gradient that is not finite" in found["0001"]["reason"]
    assert found["0002"]["best"] >= found["0002"]["last"] > found["0003"]["last"]
    assert out == (tmp_path / "run" / "sweep.md").read_text()
    assert "trial 0003-learning_rate=1e-09: stopped early after 2 of 4 steps, kl " in err
    assert "Configuration for experiment" not in out + err
    best = load_config(tmp_path / "run" / "best.yaml")
    assert best.refine.optimiser.learning_rate == 3e-3
    trial = tmp_path / "run" / "trials" / "0002-learning_rate=0.003"
    for left in ("config.yaml", "metrics.jsonl", "tensorboard", "refined/model.safetensors"):
        assert (trial / left).exists()
    assert RAY_RESULTS.exists() == had_results

    monkeypatch.setattr(stage, "ray_cluster", _must_not_start)
    assert main(arguments) == 0
    assert capsys.readouterr().out == out
    assert main([*arguments, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert main([*arguments, "seed=1"]) == EXIT_USER_ERROR
    assert "was created with another value of seed" in capsys.readouterr().err


def test_what_cannot_run_is_told(
    room_for_one: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tmp_path, 10, {"actors.start_timeout_s": {"grid": [0.01]}})
    assert main([*arguments, "actors.rollout.count=2"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.endswith(
        "lmcot: the cluster has 1 CPU, but trial '0001-start_timeout_s=0.01' takes 1.25 "
        "(driver_cpus 1 x 0.25, actors.rollout 2 x 0.25, actors.reward 1 x 0.25, actors.learner "
        "1 x 0.25): lower these, or add nodes\n"
    )
    distilled = ("refine.start_from=distilled", "teacher={kind: supporting_facts}")
    assert main([*arguments, *distilled]) == EXIT_USER_ERROR
    assert "run 'lmcot distill' on this run directory first" in capsys.readouterr().err
    assert main(arguments) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert "| failed |" in out
    assert "none of the 1 trials could be run; the first failure: TimeoutError: waited " in err


def test_an_ended_sweep_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C of the driver; the trial goes on from its checkpoint with the same command."""
    steps = 12
    arguments = command(tmp_path, steps, {RATE: {"grid": [3e-3]}}, asha={"grace_steps": 2})
    driver = subprocess.Popen(
        [sys.executable, "-m", "lmcot.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_step(tmp_path, 2, driver)
        driver.send_signal(signal.SIGINT)
        told = driver.communicate(timeout=SOON_S)[1]
    finally:
        driver.kill()
    assert driver.returncode == EXIT_INTERRUPTED
    assert "ending the sweep; its trials can resume from their last checkpoints" in told
    assert "rerun the same command to resume" in told
    assert rows(tmp_path)["0001"]["status"] == "unfinished"
    assert len(steps_logged(tmp_path)) < steps
    assert main(arguments) == 0
    assert steps_logged(tmp_path) == [*range(1, steps + 1)]
    assert rows(tmp_path)["0001"]["status"] == "finished"
    assert f"0001 | 0.003 | {steps} |" in capsys.readouterr().out
    assert not ray.is_initialized()


def _must_not_start(*_: Any) -> None:
    raise AssertionError("a cluster was started")
