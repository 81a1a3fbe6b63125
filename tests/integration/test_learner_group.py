"""A group of two real learners in a real cluster: calls, errors, and what happens when one dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util import placement_group_table

from lmcot.actors import learner_group
from lmcot.actors.learner_actor import LearnerActor, StepMetrics
from lmcot.actors.learner_group import LearnerGroup, LearnerLost
from lmcot.actors.units import Packed
from lmcot.actors.weights import checksum, load_weights
from lmcot.config import Config, load_config
from lmcot.errors import UserError
from lmcot.learner.plan import refine_plan
from lmcot.models.sources import load_model
from lmcot.records import RunState, ScoredRollout
from tests.integration.rank_cases import made_up

pytestmark = pytest.mark.e2e

TOY = Path(__file__).parents[2] / "configs" / "toy.yaml"
CPUS = 2
SOON_S = 20.0
"""In which what was ended is gone."""


def packed(step: int) -> list[Packed[list[ScoredRollout]]]:
    """A step's rollouts as they come from the reward actors."""
    return [Packed.of(made_up(step))]


def ppo_step(group: LearnerGroup, step: int) -> list[StepMetrics]:
    """A PPO step on made-up rollouts; what each rank measured."""
    return group.call(LearnerActor.ppo_step, packed(step), step)


def settings(**actors: Any) -> Config:
    """The toy with two learners."""
    return load_config(
        TOY,
        [
            "actors.learner.count=2",
            "actors.learner.cpus=0.5",
            "learner.zero_stage=2",
            "learner.tokens_per_micro_batch=48",
            "refine.optimiser.learning_rate=0.01",
            *(f"actors.{key}={value}" for key, value in actors.items()),
        ],
    )


def new_group(config: Config) -> LearnerGroup:
    return LearnerGroup(
        config,
        refine_plan(config, config.policy.source, 10),
    )


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def standing(cluster: None) -> Iterator[LearnerGroup]:
    """The group of several tests: to start one takes seconds."""
    group = new_group(settings(start_timeout_s=120, unit_timeout_s=120))
    yield group
    group.stop()


@pytest.fixture
def group(standing: LearnerGroup) -> LearnerGroup:
    """A group that is ready, started anew if the test before ended it."""
    if not standing.handles:
        standing.start()
        standing.wait_ready()
    return standing


@pytest.fixture
def room(standing: LearnerGroup) -> None:
    """No other learners: what is left is what the test left."""
    standing.stop()
    assert_nothing_is_left(standing)


def local_methods() -> tuple[Any, ...]:
    """More methods for learners: they travel with each call, by value, since they are local."""

    def pid(self: LearnerActor) -> int:
        return os.getpid()

    def refuse(self: LearnerActor, rank: int) -> str:
        from lmcot.errors import UserError

        if self._rank == rank:
            raise UserError("the folder is full: empty it")
        return "done"

    def sleep_on(self: LearnerActor, rank: int = 0) -> None:
        import time

        time.sleep(600 if self._rank == rank else 0)

    def join_only(self: LearnerActor, meeting: Any) -> None:
        from lmcot.learner.ranks import join_group

        join_group(self._rank, 2, meeting, 60)

    return pid, refuse, sleep_on, join_only


pid, refuse, sleep_on, join_only = local_methods()


def learners() -> list[psutil.Process]:
    """Learners of this process's cluster that are alive, whoever started them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if "LearnerActor" in title and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


def assert_nothing_is_left(group: LearnerGroup) -> None:
    """No actor, no process, nothing reserved; not at once, for Ray ends them by and by."""
    assert group.handles == []
    deadline = time.monotonic() + SOON_S
    while True:
        placed = [p for p in placement_group_table().values() if p["state"] != "REMOVED"]
        free = ray.available_resources().get("CPU", 0.0)
        left = learners()
        if not left and not placed and free == CPUS:
            return
        assert time.monotonic() < deadline, (left, placed, free)
        time.sleep(0.1)


def test_a_group_works_as_one(group: LearnerGroup, tmp_path: Path) -> None:
    """[27] results by rank; what is published is what was trained, on the learners' side."""
    assert len(set(group.call(pid))) == 2 == len(learners())
    before = group.call(LearnerActor.checksum)
    metrics = ppo_step(group, 0)
    assert metrics[0] == metrics[1]
    assert metrics[0].values["optimiser/updates"] == 4
    assert metrics[0].values["optimiser/skipped_updates"] == 0

    after = group.call(LearnerActor.checksum)
    assert after[0] != before[0]
    assert [before[1], after[1]] == [None, None]
    published = group.call(LearnerActor.publish, version=7)
    assert [len(references) for references in published] == [1, 0]
    weights = ray.get(published[0][0])
    assert (weights.version, weights.checksum) == (7, after[0])
    model, _ = load_model("random:counting-llama", "float32")
    assert checksum(model) != after[0]
    load_weights(model, weights)
    assert checksum(model) == after[0]

    group.call(LearnerActor.export, folder=str(tmp_path / "exported"))
    exported, _ = load_model(str(tmp_path / "exported"), "float32")
    assert checksum(exported) == after[0]


def test_calls_are_done_in_their_order_without_waiting(group: LearnerGroup) -> None:
    """What the stage relies on: a checkpoint is of the state before the step begun after it."""
    pending = []
    for step in (1, 2):
        group.begin(LearnerActor.ppo_step, scored=packed(step), step=step)
        pending.append(group.begin(LearnerActor.checksum))
    last, first = [one.result()[0] for one in reversed(pending)]
    assert first != last == group.call(LearnerActor.checksum)[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_leaves_the_group_usable(group: LearnerGroup, rank: int) -> None:
    """By one rank while the other succeeds: nobody waits for anybody."""
    before = group.call(pid)
    with pytest.raises(UserError, match=r"^the folder is full: empty it$"):
        group.call(refuse, rank=rank)
    assert group.call(refuse, rank=2) == ["done", "done"]
    assert group.call(pid) == before


def test_an_export_that_cannot_be_written_leaves_the_group_usable(
    group: LearnerGroup, tmp_path: Path
) -> None:
    """Rank 0 alone writes, when the others have done their part."""
    (tmp_path / "file").touch()
    before = group.call(pid), group.call(LearnerActor.checksum)
    with pytest.raises(RuntimeError, match=r"^the learner failed: .*File exists"):
        group.call(LearnerActor.export, folder=str(tmp_path / "file" / "below"))
    assert (group.call(pid), group.call(LearnerActor.checksum)) == before
    assert ppo_step(group, 3)[0].values["optimiser/updates"] == 4


def test_when_one_is_killed_all_are_started_again_where_they_were(
    group: LearnerGroup, tmp_path: Path
) -> None:
    """[29] kill -9 in the middle of a step; what follows the restart is the same to the bit."""
    before = ppo_step(group, 4)[0]
    group.call(LearnerActor.save_engine, folder=str(tmp_path))
    undisturbed = [ppo_step(group, step) for step in (5, 6)]

    ranks = [psutil.Process(number) for number in group.call(pid)]
    ranks[1].suspend()  # so that the other one surely waits for it
    pending = group.begin(LearnerActor.ppo_step, scored=packed(7), step=7)
    ranks[1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LearnerLost, match=r"^learner 1 was lost during 'ppo_step': "):
        pending.result()
    assert_nothing_is_left(group)
    assert time.monotonic() - started < SOON_S
    with pytest.raises(LearnerLost, match="there are no learners to call 'ppo_step' on"):
        ppo_step(group, 7)

    group.start()
    group.wait_ready()
    state = RunState("refine", 5, {}, before.kl_controller, before.reward_statistics)
    group.call(LearnerActor.restore, folder=str(tmp_path), state=state)
    again = [ppo_step(group, step) for step in (5, 6)]
    assert again == undisturbed


def test_one_that_fails_while_the_others_wait_ends_the_group(
    group: LearnerGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the grace time, with the failure that all others follow from."""
    monkeypatch.setattr(learner_group, "_GRACE_S", 1.0)
    (tmp_path / "file").touch()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^the learner failed: .*Not a directory"):
        group.call(LearnerActor.save_engine, folder=str(tmp_path / "file" / "below"))
    assert 1.0 <= time.monotonic() - started < SOON_S
    assert_nothing_is_left(group)


@pytest.mark.usefixtures("room")
def test_a_call_over_its_time_limit_ends_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the call's name, and the setting that gives it longer."""
    # Without models, for they take seconds to load.
    monkeypatch.setattr(LearnerActor, "setup", join_only)
    with new_group(settings(start_timeout_s=120, unit_timeout_s=1.5)) as group:
        group.wait_ready()
        started = time.monotonic()
        with pytest.raises(LearnerLost) as told:
            group.call(sleep_on, rank=1)
        assert time.monotonic() - started < SOON_S
        assert str(told.value) == (
            "waited 2 s for 'sleep_on' on 1 of 2 learner(s), and ended them: raise "
            "actors.unit_timeout_s if they need longer"
        )
        assert_nothing_is_left(group)


@pytest.mark.usefixtures("room")
def test_learners_that_are_too_slow_to_start_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the setting that gives them longer: another one than a call's."""
    monkeypatch.setattr(LearnerActor, "meeting", sleep_on)
    group = new_group(settings(start_timeout_s=3))
    with pytest.raises(TimeoutError, match=r"'meeting' on 1 of 1 .* raise actors\.start_timeout_s"):
        group.start()
    assert_nothing_is_left(group)


@pytest.mark.usefixtures("room")
def test_without_room_it_says_what_is_missing() -> None:
    """In the time that actors have to start, and leaves nothing that waits for room."""
    config = settings(start_timeout_s=1.0)
    role = config.actors.learner.model_copy(update={"cpus": 3.0})
    actors = config.actors.model_copy(update={"learner": role})
    group = new_group(config.model_copy(update={"actors": actors}))
    started = time.monotonic()
    with pytest.raises(TimeoutError) as told, group:
        pass
    assert time.monotonic() - started < SOON_S
    assert str(told.value) == (
        "waited 1 s for the placement of 2 learner actor(s) with 3 CPUs each (strategy PACK): "
        "check that the nodes have them free, or change actors.learner"
    )
    assert_nothing_is_left(group)
