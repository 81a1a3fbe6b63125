"""The distributed runtime: whatever is killed, and however many actors there are, the same run."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ray
import torch
from safetensors.torch import load_file

from lmcot.actors.fleet import Fleet
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.errors import UserError
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.training.batch import Batch
from lmcot.training.pipeline import Pipeline
from tests.integration.runtime_cases import (
    JUDGED,
    STEPS,
    Killer,
    assert_counted_once,
    command,
    command_line,
    end_after,
    kill,
    metrics,
    processes,
    run,
    samples,
    told,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """The run that the others are to equal: one rollout actor, judged by a frozen LM.

    It rests while the learner learns, as where both share a GPU; those of the others do not.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    with patch.object(Fleet, "tell", autospec=True, side_effect=Fleet.tell) as rested:
        run(folder, *JUDGED, f"refine.steps={STEPS}", "actors.colocate=true")
    assert [call.args[1] for call in rested.mock_calls] == [RolloutActor.rest] * STEPS
    assert_counted_once(folder, STEPS)
    assert told(folder, "health/actor_restarts") == [0] * STEPS
    return folder


def test_every_kind_of_actor_may_be_killed(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """[29] kill -9 at random moments: the run ends as the undisturbed one, with its recovery times.

    It has two rollout actors, the undisturbed one has one: their number does not show either.
    """
    killer = Killer(
        {
            2: kill("RolloutActor"),
            5: kill("RewardActor"),
            8: kill("FrozenActor"),
            11: kill("LearnerActor"),
        },
        seed=0,
    )
    run(
        tmp_path, *JUDGED, f"refine.steps={STEPS}", "actors.rollout.count=2",
        "actors.frozen.count=2", "actors.verify_weights=true", on_step=killer.on_step,
    )  # fmt: skip
    killer.finish()
    assert_counted_once(tmp_path, STEPS)
    assert metrics(tmp_path) == metrics(undisturbed)
    assert samples(tmp_path, STEPS) == samples(undisturbed, STEPS)
    for name in ("refined", "critic"):
        mine = load_file(tmp_path / name / "model.safetensors")
        theirs = load_file(undisturbed / name / "model.safetensors")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert told(tmp_path, "health/learner_restarts")[-1] == 1
    recovery = told(tmp_path, "seconds/recovery")[-1]
    said = capsys.readouterr().err
    assert 0 < recovery < 120
    # A frozen-LM actor may be back, by itself, before anybody asks it again.
    for role in ("rollout", "reward"):
        assert re.search(rf"{role} actor \d was lost \(", said)
    assert "reward actor 0 is back " in said
    assert "the learners are back after " in said
    print(f"\nlongest recovery: {recovery:.1f} s")


def test_batches_are_sampled_ahead_and_each_bears_its_version(tmp_path: Path) -> None:
    """Asynchronous, and yet the same run again with other actors, some of which are killed.

    Further questions are asked in place of those that teach nothing; they are the same ones, too.
    """
    overrides = (
        "refine.max_staleness=1", "refine.steps=6", "refine.advantage={kind: grpo}",
        "refine.filter={refill: 1.0}", "refine.curriculum={solved: 1, unsolved: 1}",
    )  # fmt: skip
    run(tmp_path / "one", *overrides)
    assert sum(told(tmp_path / "one", "filter/refilled")) > 0
    assert told(tmp_path / "one", "batch/staleness") == [0, 1, 1, 1, 1, 1]
    for step, records in enumerate(samples(tmp_path / "one", 6)):
        assert {record["policy_version"] for record in records} == {max(step - 1, 0)}
    asked = [int(number) for number in told(tmp_path / "one", "filter/asked")]
    assert_counted_once(tmp_path / "one", 6, asked)
    weights = told(tmp_path / "one", "sampler/importance_weight")
    assert weights[0] == pytest.approx(1.0, abs=1e-4), "nothing stale yet"
    assert all(abs(weight - 1) > 1e-6 for weight in weights[1:]), "staleness is corrected for"
    killer = Killer({1: kill("RolloutActor"), 3: kill("RewardActor")}, seed=2)
    run(tmp_path / "two", *overrides, "actors.rollout.count=2", on_step=killer.on_step)
    killer.finish()
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert samples(tmp_path / "two", 6) == samples(tmp_path / "one", 6)


def test_units_in_flight_at_a_checkpoint_are_sampled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver stops in the middle: none lost, none doubled, staleness within its bound.

    A rollout actor is killed before that, while batches of several versions are open.
    """
    overrides = (
        "refine.max_staleness=2", "refine.steps=8", "checkpoints.every=4", "actors.rollout.count=2",
    )  # fmt: skip
    killer = Killer({2: kill("RolloutActor")}, seed=1)
    sampled = Pipeline._sampled

    def step_8_is_never_judged(
        pipeline: Pipeline, batch: Batch, key: str, told: None, kept: Any
    ) -> None:
        if not key.startswith("step-8/"):
            sampled(pipeline, batch, key, told, kept)

    def stop(step: int, metrics: dict[str, float]) -> None:
        killer.on_step(step, metrics)
        if step == 6:
            raise UserError("stop here")

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "_sampled", step_8_is_never_judged)
        with pytest.raises(UserError, match="stop here"):
            run(tmp_path, *overrides, on_step=stop)
    killer.finish()
    assert re.search(r"rollout actor \d was lost \(", capsys.readouterr().err)
    found = CheckpointStore(tmp_path / "checkpoints").latest()
    assert found is not None
    assert found[0].step == 6
    run(tmp_path, *overrides)
    assert "refine: resuming after step 6\n" in capsys.readouterr().err
    assert_counted_once(tmp_path, 8)
    assert told(tmp_path, "batch/staleness") == [0, 1, 2, 2, 2, 2, 0, 1]
    assert not processes("RolloutActor")


def test_a_driver_that_is_ended_goes_on_with_the_same_command(
    undisturbed: Path, tmp_path: Path
) -> None:
    """SIGTERM leaves a checkpoint and exit code 130; `test_s3` does the same with kill -9."""
    driver = command(tmp_path, *JUDGED, f"refine.steps={STEPS}")
    code, left = end_after(driver, tmp_path, 5, signal.SIGTERM)
    assert code == 130
    assert not left, "its Ray processes end with it"
    found = CheckpointStore(tmp_path / "checkpoints").latest()
    assert found is not None
    assert 5 <= found[0].step < STEPS
    run(tmp_path, *JUDGED, f"refine.steps={STEPS}", "actors.rollout.count=2")
    assert_counted_once(tmp_path, STEPS)
    assert metrics(tmp_path) == metrics(undisturbed)
    assert samples(tmp_path, STEPS) == samples(undisturbed, STEPS)


def test_parts_of_a_run_can_be_looked_at_by_themselves(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampling alone, learning alone, a step once more: all as in the run that they are of."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = metrics(folder)
    assert command_line("debug", "replay", folder, "--step", "4", "--json") == 0
    said = capsys.readouterr()
    assert "debug replay: step 4 then and now: all equal" in said.err
    (line,) = said.out.splitlines()
    replayed = json.loads(line)
    assert replayed["step"] == 4
    policy = replayed["metrics"]["loss/policy"]
    assert policy == {"then": policy["now"], "now": before[3]["loss/policy"], "differs": False}
    kept = tmp_path / "kept"
    kept.mkdir()
    for step in (1, 2, 3):
        shutil.copy(folder / "rollouts" / f"step-{step:06d}.jsonl", kept)
    assert command_line("debug", "learn", folder, "--rollouts", str(kept)) == 0
    learned = metrics(folder / "debug" / "learn")
    assert [line["step"] for line in learned] == [1, 2, 3]
    for mine, theirs in zip(learned, before, strict=False):
        assert mine == {name: theirs[name] for name in mine}
    assert command_line("debug", "rollout", folder, "--steps", "2") == 0
    sampled = metrics(folder / "debug" / "rollout")
    assert [line["step"] for line in sampled] == [1, 2]
    assert samples(folder / "debug" / "rollout", 1) == samples(folder, 1)
    other = ("--policy", str(folder / "refined"), "--steps", "1")
    assert command_line("debug", "rollout", folder, *other) == 0
    assert samples(folder / "debug" / "rollout", 1) != samples(folder, 1)
    assert metrics(folder) == before, "the run is left as it is"
    assert command_line("debug", "replay", folder, "--step", "99") == 2
    assert "has no step 99 to replay" in capsys.readouterr().err
