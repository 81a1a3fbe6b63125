"""Metrics, TensorBoard, rollouts and curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmcot.monitor.curves import plot_training
from lmcot.monitor.metrics import Monitor, read_metrics


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def steps(run_dir: Path, stage: str) -> list[int]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [line["step"] for line in lines if line["stage"] == stage]


def test_a_logged_step_is_on_disk_at_once_in_both_forms(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.log(3, "refine", {"reward/mean": 0.25, "kl": 2})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.pop("time") > 1e9
    assert line == {"step": 3, "stage": "refine", "reward/mean": 0.25, "kl": 2.0}
    assert scalars(tmp_path, "refine/reward/mean") == [(3, 0.25)]
    monitor.close()


def test_nan_and_infinity_become_null_and_are_counted(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        monitor.log(1, "refine", {"loss": math.nan, "kl": math.inf, "reward": 1.0})
        assert monitor.nonfinite == 2
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["kl"], line["reward"]) == (None, None, 1.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["refine/reward"]


def test_metrics_cannot_shadow_the_lines_own_keys(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor, pytest.raises(ValueError, match="step"):
        monitor.log(1, "refine", {"step": 2.0})


def test_after_a_resume_each_step_is_there_once_and_other_stages_stay(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        for step in range(1, 6):
            monitor.log(step, "distil", {"loss": step})
        for step in range(1, 5):
            monitor.log(step, "refine", {"reward": step})
    with Monitor(tmp_path) as monitor:
        monitor.truncate("refine", 2)
        monitor.log(3, "refine", {"reward": 30.0})
        assert steps(tmp_path, "distil") == [1, 2, 3, 4, 5]
        assert steps(tmp_path, "refine") == [1, 2, 3]
        assert scalars(tmp_path, "distil/loss") == [(step, float(step)) for step in range(1, 6)]
        assert scalars(tmp_path, "refine/reward") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_truncating_nothing_changes_nothing(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        monitor.truncate("refine", 0)
        monitor.log(1, "refine", {"reward": 1.0})
        before = (tmp_path / "metrics.jsonl").stat().st_ino
        monitor.truncate("refine", 1)
        assert (tmp_path / "metrics.jsonl").stat().st_ino == before


@pytest.mark.parametrize(
    ("tail", "expected"),
    [('{"step": 2, "sta', [1]), ('{"step": 2, "stage": "refine"}', [1, 2]), ("", [1])],
)
def test_a_line_cut_by_a_kill_is_survived(tmp_path: Path, tail: str, expected: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "refine"}\n' + tail, encoding="utf-8")
    assert steps(tmp_path, "refine") == expected
    with Monitor(tmp_path) as monitor:
        monitor.log(9, "refine", {"reward": 1.0})
    assert steps(tmp_path, "refine") == [*expected, 9]


def test_a_first_line_cut_by_a_kill_is_survived(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"st', encoding="utf-8")
    Monitor(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == ""


def test_rollouts_are_one_json_line_each(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        monitor.rollouts(7, '{"text": "Zürich"}\n{"reward": 1.0}\n'.encode())
    lines = (tmp_path / "rollouts" / "step-000007.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "Zürich"},
        {"reward": 1.0},
    ]
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000007.jsonl"]


def test_curves_are_drawn_with_whatever_series_there_are(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        for step in range(1, 61):
            monitor.log(step, "refine", {"reward/mean": step, "reward/em": math.nan, "odd": 1.0})
    for stage, name in (("refine", "curves.png"), ("never run", "none.png")):
        plot_training(tmp_path / "metrics.jsonl", tmp_path / name, stage)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    plot_training(tmp_path / "missing.jsonl", tmp_path / "missing.png")
    assert (tmp_path / "missing.png").stat().st_size > 1000
