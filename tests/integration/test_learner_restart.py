"""Whole stages whose learners are killed: they go on as if nothing had happened."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcot.actors.fleet import Fleet
from lmcot.actors.kept import Kept
from lmcot.actors.learner_group import LearnerGroup, PendingCall
from lmcot.actors.units import Packed
from lmcot.config import load_config
from lmcot.errors import UserError
from lmcot.learner.checkpoints import MARKER
from lmcot.models.sources import load_model
from lmcot.monitor.catalogue import VARYING
from lmcot.monitor.metrics import Monitor, read_metrics
from lmcot.records import ScoredRollout
from lmcot.run.context import open_run
from lmcot.training.batch import Batch
from lmcot.training.distill import distill
from lmcot.training.refine import refine

pytestmark = pytest.mark.e2e

TOY = Path(__file__).parents[2] / "configs" / "toy.yaml"
SMOKE = TOY.with_name("smoke_t5.yaml")
STEPS = 8
SOON_S = 20.0
SETTINGS = (
    f"refine.steps={STEPS}",
    "refine.prompts_per_step=4",
    "refine.samples_per_prompt=3",
    "refine.scale_rewards=true",
    "refine.kl={kind: adaptive, coefficient: 0.1, target: 0.05, horizon: 60}",
    "learner.zero_stage=2",
    "learner.tokens_per_micro_batch=64",
    "actors.prompts_per_unit=2",
    "actors.rollout.count=1",
    "actors.learner.count=2",
    "checkpoints.every=3",
    "checkpoints.keep=2",
)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run(folder: Path, *overrides: str) -> None:
    """What `lmcot refine` does."""
    config = load_config(TOY, [*SETTINGS, *overrides])
    with open_run(config, folder) as opened:
        refine(opened)


def learners() -> list[psutil.Process]:
    """Processes of the learners in this process's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and "ray::LearnerActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


def ended() -> bool:
    """Whether there are no learners, or soon are none: Ray ends them by and by."""
    return not psutil.wait_procs(learners(), timeout=SOON_S)[1]


def kill_during(monkeypatch: pytest.MonkeyPatch, *calls: tuple[str, int]) -> list[int]:
    """Kills a learner (-9) in the middle of some calls: of each by its name, the so-manyeth.

    Returns:
        the pids of those that were killed, once they were.
    """
    begin = LearnerGroup.begin
    begun: list[str] = []
    killed: list[int] = []

    def spied(group: LearnerGroup, method: Any, *args: Any, **kwargs: Any) -> PendingCall[Any]:
        name = method.__name__
        begun.append(name)
        if (name, begun.count(name)) not in calls:
            return begin(group, method, *args, **kwargs)
        deadline = time.monotonic() + SOON_S
        while not (alive := learners()):  # just started, it may have no process yet
            assert time.monotonic() < deadline
            time.sleep(0.05)
        alive[-1].suspend()  # it cannot be done before it is killed
        pending = begin(group, method, *args, **kwargs)
        alive[-1].kill()
        killed.append(alive[-1].pid)
        return pending

    monkeypatch.setattr(LearnerGroup, "begin", spied)
    return killed


def comparable(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, save those that tell how it went about it."""
    left_out = ("stage", "time", *VARYING)
    return [
        {k: v for k, v in line.items() if not k.startswith(left_out)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def restarts(folder: Path) -> list[float]:
    """Of the learners, as each step tells."""
    return [line["health/learner_restarts"] for line in read_metrics(folder / "metrics.jsonl")]


def checkpoints(folder: Path) -> list[str]:
    """Names of those that are complete."""
    return sorted(marker.parent.name for marker in folder.glob(f"checkpoints/*/{MARKER}"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """The run that the others are to equal."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    assert [line["step"] for line in comparable(folder)] == [*range(1, STEPS + 1)]
    assert restarts(folder) == [0] * STEPS
    assert checkpoints(folder) == ["step-000006", "step-000008"]
    assert ended()
    return folder


def test_without_restarts_the_same_command_goes_on(
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """[29] kill -9 while a checkpoint is written: that one does not count, the one before does.

    What a resumed run may change, what it may not, and that it has an end, are told.
    """
    with monkeypatch.context() as patched:
        kill_during(patched, ("save_engine", 2))
        with pytest.raises(RuntimeError) as stopped:
            run(tmp_path, "actors.max_learner_restarts=0")
    told = str(stopped.value)
    assert " was lost during " in told
    assert told.endswith(
        "; the learners were started again 0 times before: see Ray's logs for why they die"
    )
    assert ended()
    assert checkpoints(tmp_path) == ["step-000003"]
    assert (tmp_path / "checkpoints" / "step-000006").is_dir()
    assert len(comparable(tmp_path)) == 6

    with monkeypatch.context() as patched:
        patched.setattr(Fleet, "__init__", _must_not_start)
        patched.setattr(LearnerGroup, "start", _must_not_start)
        refused = {
            "actors.learner.count=1": "was written with actors.learner.count 2, not 1: ",
            "refine.steps=2": "has come to step 3 in this run directory, but the settings ask for "
            "2 steps only",
            "learner.zero_stage=3": "was created with another value of learner.zero_stage: restore",
        }
        for override, words in refused.items():
            with pytest.raises(UserError, match=words):
                run(tmp_path, override)
    capsys.readouterr()

    run(tmp_path, "learner.tokens_per_micro_batch=48")
    said = capsys.readouterr().err
    assert "resumed with another learner.tokens_per_micro_batch: 48 now, 64 before" in said
    assert "refine: resuming after step 3" in said
    assert checkpoints(tmp_path) == checkpoints(undisturbed)
    mine, theirs = comparable(tmp_path), comparable(undisturbed)
    assert mine[:3] == theirs[:3]
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)

    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    run(tmp_path)
    assert f"refine: done already, {STEPS} steps" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_what_a_refused_step_left_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[29] some of its updates were done: a checkpoint would be of half a step."""

    def poisoned(batch: Batch) -> list[Kept[Packed[list[ScoredRollout]]]]:
        units = list(batch.scored_by_unit.values())
        if batch.version < 2:
            return units
        first, *others = ray.get(units[0].ref).open()
        logprobs = (float("nan"), *first.rollout.logprobs[1:])
        bad = replace(first, rollout=replace(first.rollout, logprobs=logprobs))
        return [Kept(ray.put(Packed.of([bad, *others]))), *units[1:]]

    monkeypatch.setattr(Batch, "scored", property(poisoned))
    with pytest.raises(UserError, match="had a loss or gradient that is not finite"):
        run(
            tmp_path,
            "actors.learner.count=1",
            "learner.max_skipped_updates=0",
            "refine.minibatches=4",
            "checkpoints.every=8",
        )
    assert [line["optimiser/updates"] for line in comparable(tmp_path)] == [8, 8]
    assert checkpoints(tmp_path) == []
    assert ended()


def test_distillation_goes_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[29] kill -9 in the middle of step 4: step 3, done before and again, is the same."""
    logged: list[tuple[int, dict[str, float]]] = []
    log = Monitor.log

    def spied(monitor: Monitor, step: int, name: str, metrics: dict[str, float]) -> None:
        logged.append((step, {k: v for k, v in metrics.items() if not k.startswith(VARYING)}))
        log(monitor, step, name, metrics)

    monkeypatch.setattr(Monitor, "log", spied)
    killed = kill_during(monkeypatch, ("distill_step", 4))
    config = load_config(
        SMOKE,
        [
            "policy.source=random:llama",
            "data.max_train=8",
            "distill.epochs=2",
            "distill.optimiser.decay=linear",
            "learner.zero_stage=2",
            "checkpoints.every=2",
        ],
    )
    with open_run(config, tmp_path) as opened:
        distill(opened)
    assert len(killed) == 1
    told = capsys.readouterr().err
    assert "distill: learner 0 was lost during 'distill_step'" in told
    assert "distill: resuming after step 2" in told
    assert [step for step, _ in logged] == [1, 2, 3, 3, 4]
    assert logged[2] == logged[3]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert json.loads((tmp_path / "stages.json").read_text())["distill"]["steps"] == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "distilled")
    assert ended()


def _must_not_start(*_: Any, **__: Any) -> None:
    raise AssertionError("an actor was started")


def test_adapters_are_merged_into_a_plain_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA through the whole stage, with a lone learner that is killed at the very end.

    And when it starts again: that counts as one more restart.
    """
    killed = kill_during(monkeypatch, ("export", 1), ("setup", 2))
    run(tmp_path, "policy.lora={rank: 4}", "actors.learner.count=1", "refine.steps=3")
    assert len(killed) == 2
    told = capsys.readouterr().err
    assert told.count("starting the learners again") == 2
    assert "was lost during 'export'" in told
    assert "was lost during 'setup'" in told
    assert [line["step"] for line in comparable(tmp_path)] == [1, 2, 3]
    assert ended()

    base, _ = load_model("random:counting-llama", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "refined")
    AutoTokenizer.from_pretrained(tmp_path / "refined")
    assert type(merged) is type(base)
    before, after = base.state_dict(), merged.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}
    adapters = load_file(tmp_path / "refined-adapters" / "adapter_model.safetensors")
    assert len(adapters) == 2 * len(changed)
    for name in changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapters[f"{stem}.lora_{letter}.weight"] for letter in "AB")
        assert a.shape[0] == b.shape[1] == 4
        torch.testing.assert_close(after[name], before[name] + 8 * b @ a, atol=1e-6, rtol=0)
