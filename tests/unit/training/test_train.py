"""What `lmcot train` checks before its first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcot.config import parse_config
from lmcot.errors import UserError
from lmcot.monitor.metrics import Monitor
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from lmcot.training.train import policies_in_the_end, train


def run_of(folder: Path, rows: list[str], **changes: Any) -> Run:
    config = parse_config(
        {
            "data": {
                "train": {"kind": "sample", "split": "train"},
                "validation": {"kind": "sample", "split": "validation"},
                "max_train": 2,
                "max_validation": 2,
            },
            "policy": {"source": "random:llama"},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "teacher": {"kind": "supporting_facts"},
            "evaluate": {"rows": rows},
            **changes,
        }
    )
    return Run(config, RunDirectory(folder), Monitor(folder), Interruption())


def test_a_row_of_a_policy_that_no_stage_makes_is_refused_before_the_first(tmp_path: Path) -> None:
    run = run_of(tmp_path, ["standard", "guided_rejection"])
    with pytest.raises(UserError, match="holds 'guided_rejection', but there is no rejection pol"):
        train(run)
    assert not list(tmp_path.glob("rationales*")), "nothing has begun"


def test_policies_in_the_end_are_those_that_are_made_given_or_there(tmp_path: Path) -> None:
    run = run_of(tmp_path, [])
    assert policies_in_the_end(run) == ["base", "distilled", "refined"]
    with_reject = run_of(tmp_path, [], reject={"optimiser": {"learning_rate": 1e-3}})
    assert policies_in_the_end(with_reject) == ["base", "distilled", "rejection", "refined"]
    start = {"teacher": None, "refine": {"start_from": "base"}}
    assert policies_in_the_end(run_of(tmp_path, [], **start)) == ["base", "refined"]
    given = {"rows": [], "policies": {"distilled": "random:llama"}}
    named = run_of(tmp_path, [], **start, evaluate=given)
    assert policies_in_the_end(named) == ["base", "distilled", "refined"]
    run.directory.path.mkdir(exist_ok=True)
    with RunDirectory(tmp_path) as directory:
        directory.finish("distill", steps=1)
    assert policies_in_the_end(run_of(tmp_path, [], **start)) == ["base", "distilled", "refined"]
