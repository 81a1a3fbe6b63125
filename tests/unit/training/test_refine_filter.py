"""Whole refinements with a filter and a curriculum, in the test's own process and without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray

from lmcot.actors import rollout_actor
from lmcot.actors.kept import Kept
from lmcot.actors.reward_actor import RewardActor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.config import load_config
from lmcot.errors import UserError
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.learner.plan import refine_plan
from lmcot.monitor.catalogue import CATALOGUE, VARYING, describe
from lmcot.monitor.metrics import Monitor, read_metrics
from lmcot.records import RunState
from lmcot.rollout_log import read_scored
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from lmcot.training import pipeline
from lmcot.training import refine as module
from lmcot.training.learners import Learners
from lmcot.training.pipeline import Fleets
from lmcot.training.refine import refine
from tests.support.learners_in_process import Killed, learn_in_process

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

TOY = Path(__file__).parents[3] / "configs" / "toy.yaml"
STEPS, PROMPTS, SAMPLES = 8, 4, 2
SETTINGS = (
    f"refine.steps={STEPS}",
    f"refine.prompts_per_step={PROMPTS}",
    f"refine.samples_per_prompt={SAMPLES}",
    "refine.advantage={kind: grpo}",
    "refine.epochs=1",
    "refine.scale_rewards=true",
    "refine.kl={kind: adaptive, coefficient: 0.1, target: 0.05, horizon: 60}",
    "data.train={kind: counting, examples: 13}",
    "actors.prompts_per_unit=2",
    "checkpoints.every=3",
    "monitor.ray_metrics=false",
)
FILTER = "refine.filter={refill: 1.0}"
CURRICULUM = "refine.curriculum={solved: 1, unsolved: 1, rest: 1}"


class Ref:
    """Ray's reference to an object, in one process."""

    numbers = count()

    def __init__(self, value: Any) -> None:
        self.value = value
        self._number = next(self.numbers)

    def hex(self) -> str:
        return f"{self._number:x}"


def _got(asked: Any) -> Any:
    return [one.value for one in asked] if isinstance(asked, list) else asked.value


class FleetInProcess:
    """One actor; `turn` has it do a unit, the last or the first of those that wait."""

    def __init__(self, actor: Any, last_first: bool) -> None:
        self._actor, self._last_first = actor, last_first
        self._units: list[Callable[[], None]] = []
        self.handles = [actor]
        self.recoveries: list[float] = []
        self.lost = 0

    @property
    def waiting(self) -> int:
        return len(self._units)

    def submit_split(self, method: Any, key: str, unit: Any, then: Any, *, kept: int) -> None:
        def done() -> None:
            split = method(self._actor, unit)
            assert len(split.kept) == kept
            then(key, split.told, tuple(Kept(Ref(value)) for value in split.kept))

        self._units.append(done)

    def turn(self) -> None:
        if self._units:
            self._units.pop(-1 if self._last_first else 0)()

    def refs(self) -> list[Any]:
        return []

    def idle_share(self) -> float:
        return 0.0

    def abandon(self) -> None:
        self._units.clear()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Weights go from hand to hand, and nobody waits for news. One thread sums in one order."""
    monkeypatch.setattr(rollout_actor, "use_threads", lambda threads: None)  # the test's own
    monkeypatch.setattr(ray, "put", Ref)
    monkeypatch.setattr(ray, "get", _got)
    monkeypatch.setattr(pipeline, "wait_for_news", lambda *sources: None)


def run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *overrides: str,
    killed_at: tuple[str, int] | None = None,
    last_first: bool = False,
) -> list[str]:
    """What `lmcot refine` does; the names of the calls that the learners got."""
    config = load_config(TOY, [*SETTINGS, *overrides])

    @contextmanager
    def started(run: Run) -> Iterator[tuple[Fleets, Learners]]:
        policy = config.policy
        rollout = RolloutActor(policy, policy.source, config.prompts, 1, trains=True, verify=True)
        rollout.setup()
        sampling: Any = FleetInProcess(rollout, last_first)
        judging: Any = FleetInProcess(RewardActor(config), last_first)
        fleets = Fleets(sampling, judging)
        with Learners(run, refine_plan(config, policy.source, STEPS)) as learners:
            learners.wait_ready()
            yield fleets, learners

    monkeypatch.setattr(module, "started_actors", started)
    calls = learn_in_process(monkeypatch, killed_at)
    with RunDirectory(folder) as directory, Monitor(folder, config.monitor) as monitor:
        refine(Run(config, directory, monitor, Interruption()))
    return calls


def logged(folder: Path) -> list[dict[str, Any]]:
    left_out = ("time", *VARYING)
    return [
        {name: value for name, value in line.items() if not name.startswith(left_out)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def records(folder: Path, step: int) -> list[dict[str, Any]]:
    text = (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def state(folder: Path) -> RunState:
    """That of the newest checkpoint."""
    found = CheckpointStore(folder / "checkpoints").latest()
    assert found is not None
    return found[0]


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern)}


@pytest.mark.usefixtures("in_process")
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[29] with a filter and a curriculum; the units come in another order each time."""
    chosen, whole = (FILTER, CURRICULUM), tmp_path / "whole"
    run(whole, monkeypatch, *chosen)
    for call, number in (("ppo_step", 5), ("save_engine", 2)):
        again = tmp_path / call
        with pytest.raises(Killed):
            run(again, monkeypatch, *chosen, killed_at=(call, number), last_first=True)
        assert len(logged(again)) < STEPS
        run(again, monkeypatch, *chosen)
        assert logged(again) == logged(whole)
        for pattern in ("rollouts/*.jsonl", "refined/model.safetensors"):
            assert files(again, pattern) == files(whole, pattern) != {}
        assert state(again) == state(whole)
    assert sum(line["filter/refilled"] for line in logged(whole)) > 0
    assert sum(line["curriculum/passed"] for line in logged(whole)) > 0


@pytest.mark.usefixtures("in_process")
def test_each_step_learns_what_it_keeps_and_tells_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awake = "refine.curriculum={solved: 9, unsolved: null}"
    run(tmp_path, monkeypatch, FILTER, awake)
    chosen = {name for name in CATALOGUE if name.startswith(("filter/", "curriculum/"))}
    for line in logged(tmp_path):
        assert chosen <= line.keys()
        assert all(describe(name) for name in line if name not in ("step", "stage"))
        written = records(tmp_path, line["step"])
        assert len({(one["example_id"], one["sample"]) for one in written}) == len(written)
        asked = {one["example_id"] for one in written}
        left_out = {one["example_id"]: one["left_out"] for one in written if "left_out" in one}
        assert line["filter/asked"] == len(asked) == PROMPTS + line["filter/refilled"]
        reasons = {why: line[f"filter/{why}"] for why in ("right", "wrong", "equal", "few")}
        assert reasons == {why: [*left_out.values()].count(why) for why in reasons}
        assert line["filter/filled"] == (len(asked) - len(left_out)) / PROMPTS
        assert line["filter/filled"] == 1 or line["filter/refilled"] == PROMPTS
        assert line["batch/rationales"] == len(written)
        rewards = [one["reward"] for one in written]
        assert line["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert (line["reward/min"], line["reward/max"]) == (min(rewards), max(rewards))
        for question in asked:
            own = {one["reward"] for one in written if one["example_id"] == question}
            assert (len(own) == 1) == (question in left_out)
        learnt = [one for one in written if "left_out" not in one]
        assert line["batch/tokens"] == sum(len(one["response_ids"]) for one in learnt)
        again = read_scored(tmp_path / "rollouts", line["step"])
        assert [one.rollout.sample for one in again] == [one["sample"] for one in learnt]


@pytest.mark.usefixtures("in_process")
def test_a_step_that_keeps_nothing_learns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No rationale is ever right: a policy at its start writes no eight increasing numbers."""
    never = ("refine.filter={by: right, refill: 0.5}", "rewards.length=40")
    with pytest.raises(UserError, match=r"learned nothing: refine\.filter left out all"):
        run(tmp_path, monkeypatch, *never)
    said = capsys.readouterr().err
    told = "learns nothing: none of the 6 questions that it asked is kept by refine.filter"
    assert said.count(told) == STEPS
    assert said.count("alarm: unfilled_steps: steps have learnt from only 0%") == 1
    lines = logged(tmp_path)
    assert [line["filter/filled"] for line in lines] == [0] * STEPS
    assert all("loss/policy" not in line and "reward/mean" in line for line in lines)
    assert read_scored(tmp_path / "rollouts", 1) == []
    assert state(tmp_path).step == STEPS
    assert state(tmp_path).kl_controller == {}, "the controller has seen nothing"
