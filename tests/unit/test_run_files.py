"""Names of a run's files, and the format that they have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcot import run_files
from lmcot.config import EvaluateSettings
from lmcot.config.stages import TRAINING_STAGES, most_trained
from lmcot.errors import UserError


def test_names_of_rollouts_are_found_again(tmp_path: Path) -> None:
    for step in (3, 1, 1_000_000):
        (tmp_path / run_files.rollouts_name(step)).touch()
    (tmp_path / "step-7.jsonl").touch()  # not of lmcot
    assert run_files.rollout_steps(tmp_path) == [1, 3, 1_000_000]


def test_the_most_trained_policy_is_the_last_complete_one(tmp_path: Path) -> None:
    assert most_trained(tmp_path) is None
    (tmp_path / "distilled").mkdir()
    (tmp_path / "distilled" / "config.json").touch()
    (tmp_path / "refined").mkdir()  # being written
    assert most_trained(tmp_path) == "distilled"
    (tmp_path / "refined" / "config.json").touch()
    assert most_trained(tmp_path) == "refined"


def test_adapters_lie_beside_their_model(tmp_path: Path) -> None:
    folder = run_files.adapters_folder(tmp_path / "refined")
    assert folder == tmp_path / "refined-adapters"
    assert run_files.model_folder(folder.name) == run_files.model_folder("refined") == "refined"


def test_a_run_of_this_format_or_without_a_record_is_read(tmp_path: Path) -> None:
    run_files.check_format(tmp_path)
    run_files.write_format(tmp_path)
    run_files.check_format(tmp_path)


def test_a_run_of_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    newer = run_files.FORMAT + 1
    (tmp_path / "format.json").write_text(json.dumps({"format": newer}))
    with pytest.raises(UserError, match=f"format {newer}, but .* up to {run_files.FORMAT}"):
        run_files.check_format(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "\x00"])
def test_a_damaged_record_of_the_format_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "format.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        run_files.check_format(tmp_path)


def test_the_settings_can_name_a_source_for_each_policy() -> None:
    for policy in (stage.policy for stage in TRAINING_STAGES):
        settings = EvaluateSettings.model_validate({"policies": {policy: "given"}})
        assert settings.given_source(policy) == "given"
