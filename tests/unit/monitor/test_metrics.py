"""Metrics, TensorBoard, rollouts and curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from lmcot.monitor.catalogue import describe
from lmcot.monitor.curves import plot_training
from lmcot.monitor.metrics import Monitor, read_metrics


def board(run_dir: Path, stage: str) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard" / stage))
    events.Reload()
    return events


def scalars(run_dir: Path, stage: str, tag: str) -> list[tuple[int, float]]:
    events = board(run_dir, stage)
    return [
        (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
        for event in events.Tensors(tag)
    ]


def steps(run_dir: Path, stage: str) -> list[int]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [line["step"] for line in lines if line["stage"] == stage]


def test_a_logged_step_is_on_disk_at_once_in_both_forms(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.log(3, "refine", {"reward/mean": 0.25, "kl": 2})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.pop("time") > 1e9
    alarms = {"alarm/kl_high": 0.0, "alarm/kl_negative": 0.0, "alarm/not_finite": 0.0}
    assert line == {"step": 3, "stage": "refine", "reward/mean": 0.25, "kl": 2.0, **alarms}
    assert scalars(tmp_path, "refine", "reward/mean") == [(3, 0.25)]
    monitor.close()


def test_nan_and_infinity_become_null_and_are_counted(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        monitor.log(1, "refine", {"loss": math.nan, "value": math.inf, "reward": 1.0})
        assert monitor.nonfinite == 2
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["value"], line["reward"]) == (None, None, 1.0)
    assert board(tmp_path, "refine").Tags()["tensors"] == ["reward", "alarm/not_finite", "alarms"]
    assert scalars(tmp_path, "refine", "alarm/not_finite") == [(1, 1.0)]


def test_metrics_cannot_shadow_the_lines_own_keys(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor, pytest.raises(ValueError, match="step"):
        monitor.log(1, "refine", {"step": 2.0})


def test_after_a_resume_each_step_is_there_once_and_other_stages_stay(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        for step in range(1, 6):
            monitor.log(step, "distil", {"loss": step})
        for step in range(1, 5):
            monitor.histograms(step, "refine", {"reward": [step, step + 1.0]})
            monitor.text(step, "refine", "samples", f"written at step {step}")
            monitor.log(step, "refine", {"reward": step, "kl": 0.0 if step < 3 else 99.0})
    event_file = max((tmp_path / "tensorboard" / "refine").iterdir())
    with event_file.open("r+b") as file:  # as a kill leaves it
        file.truncate(event_file.stat().st_size - 7)
    with Monitor(tmp_path) as monitor:
        monitor.truncate("refine", 2)
        monitor.text(3, "refine", "samples", "written anew")
        monitor.log(3, "refine", {"reward": 30.0})
        assert steps(tmp_path, "distil") == [1, 2, 3, 4, 5]
        assert steps(tmp_path, "refine") == [1, 2, 3]
        assert scalars(tmp_path, "distil", "loss") == [(step, float(step)) for step in range(1, 6)]
        assert scalars(tmp_path, "refine", "reward") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    refine = board(tmp_path, "refine")
    texts = [
        (event.step, tensor_util.make_ndarray(event.tensor_proto).item().decode())
        for event in refine.Tensors("samples")
    ]
    assert texts == [
        (1, "written at step 1"), (2, "written at step 2"), (3, "written anew"),
    ]  # fmt: skip
    assert [event.step for event in refine.Tensors("spread/reward")] == [1, 2]
    assert "alarms" not in refine.Tags()["tensors"], "those of the steps that are no more"


def test_a_kill_between_the_line_and_the_board_leaves_no_gap(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        for step in range(1, 4):
            monitor.log(step, "refine", {"reward": step})
    event_file = max((tmp_path / "tensorboard" / "refine").iterdir())
    with event_file.open("r+b") as file:
        file.truncate(event_file.stat().st_size - 7)
    assert len(scalars(tmp_path, "refine", "reward")) == 2
    with Monitor(tmp_path) as monitor:
        monitor.truncate("refine", 3)
    assert scalars(tmp_path, "refine", "reward") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_evaluation_rows_are_described_where_they_are_written(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        monitor.evaluation(20, {"guided": {"em": 50.0, "n": 8}, "standard": {"f1": 12.5}})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    found = {name: value for name, value in line.items() if name.startswith("evaluation/")}
    assert (line["step"], line["stage"]) == (20, "evaluation")
    assert found == {
        "evaluation/guided/em": 50.0,
        "evaluation/guided/n": 8.0,
        "evaluation/standard/f1": 12.5,
    }
    assert all(describe(name) for name in found)


def test_alarms_are_told_as_if_the_run_had_never_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(1, 7):
        with Monitor(tmp_path) as monitor:  # resumed before every step
            monitor.truncate("refine", step - 1)
            monitor.log(step, "refine", {"response/cut_share": 1.0, "kl": 99.0})
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1:4] for line in told] == [
        ["step 1", "alarm", "kl_high"],
        ["step 5", "alarm", "length_limit"],
    ]
    states = [line["alarm/length_limit"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert states == [0, 0, 0, 0, 1, 1]
    texts = [event.step for event in board(tmp_path, "refine").Tensors("alarms")]
    assert texts == [1, 5]


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
