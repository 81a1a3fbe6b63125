"""A run's settings and metrics in W&B and MLflow, without leaving the machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmcot.cli import main
from lmcot.config import dump_config, parse_config
from lmcot.monitor.metrics import Monitor


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "rewards": {"kind": "increasing"},
            "refine": {"start_from": "base", "steps": 3},
        }
    )
    folder = tmp_path / "mine"
    with Monitor(folder) as monitor:
        monitor.log(1, "distill", {"loss": 2.0})
        for step in (1, 2, 3):
            monitor.log(step, "refine", {"reward/mean": step / 4, "kl": float("nan")})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder


def test_what_is_not_installed_or_not_there_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tracker in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, tracker, None)
        assert main(["export", str(run), "--to", tracker]) == 2
        assert f"pip install 'lmcot[{tracker}]'" in capsys.readouterr().err
    assert main(["export", str(run / "none"), "--to", "wandb"]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    assert main(["export", str(run), "--to", "wandb"]) == 2
    assert "has no metrics yet" in capsys.readouterr().err


def test_mlflow_has_each_stages_metrics_by_step(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    assert main(["export", str(run), "--to", "mlflow", "--project", "trial"]) == 0
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("trial")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params["refine.steps"] == "3"
    history = client.get_metric_history(found.info.run_id, "refine/reward/mean")
    assert [(one.step, one.value) for one in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert "refine/kl" not in found.data.metrics
    assert found.data.metrics["distill/loss"] == 2.0


def test_wandb_writes_offline(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["export", str(run), "--to", "wandb", "--project", "trial"]) == 0
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"refine/reward/mean" in content
    assert b"distill/loss" in content
    assert b"refine/kl" not in content
