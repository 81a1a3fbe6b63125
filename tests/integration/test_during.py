"""Evaluation in the middle of refinement: the run is the same with it and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from lmcot.errors import UserError
from lmcot.monitor.metrics import read_metrics
from tests.integration.runtime_cases import JUDGED, metrics, run, samples

pytestmark = pytest.mark.e2e

DURING = ("evaluate.during={every: 2, questions: 3, metric: inclusion}",)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def evaluations(folder: Path) -> list[int]:
    """After which steps there was one."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [line["step"] for line in lines if line["stage"] == "evaluation"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_evaluation_changes_nothing_and_keeps_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is resumed: no evaluation is lost, none is doubled."""
    without, folder = tmp_path / "without", tmp_path / "with"
    run(without, *JUDGED, "refine.steps=4")
    with pytest.raises(UserError, match=r"questions of data.validation are in data.train too"):
        run(folder, *JUDGED, *DURING, "refine.steps=3")
    allowed = (*JUDGED, *DURING, "evaluate.allow_overlap=true")

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step >= 3 and 2 in evaluations(folder):
            raise UserError("stop here")

    with pytest.raises(UserError, match="stop here"):
        run(folder, *allowed, "refine.steps=4", on_step=stop)
    run(folder, *allowed, "refine.steps=4")
    assert sorted(evaluations(folder)) == [0, 2, 4]
    mine = [line for line in metrics(folder) if line["stage"] == "refine"]
    assert mine == metrics(without)
    assert samples(folder, 4) == samples(without, 4)
    final = weights(folder / "refined")
    assert all(
        torch.equal(final[name], tensor) for name, tensor in weights(without / "refined").items()
    )

    lines = {line["step"]: line for line in read_metrics(folder / "metrics.jsonl")
             if line["stage"] == "evaluation"}  # fmt: skip
    assert {line["evaluation/guided/n"] for line in lines.values()} == {3}
    best = json.loads((folder / "best" / "lmcot-best.json").read_text(encoding="utf-8"))
    values = {step: lines[step]["evaluation/guided/inclusion"] for step in sorted(lines)}
    first_best = max(values, key=lambda step: values[step])
    assert (best["step"], best["value"]) == (first_best, values[first_best])
    kept = weights(folder / "best")
    same = all(torch.equal(final[name], tensor) for name, tensor in kept.items())
    assert same == (best["step"] == 4)
    assert not list(folder.glob(".candidate*"))
    said = capsys.readouterr().err
    assert "evaluation at step 0: em " in said
