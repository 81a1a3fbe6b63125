"""Fleets of real Ray actors: order, restarts, deadlines, errors, weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from lmcot.actors.base import ActorBase
from lmcot.actors.fleet import Fleet
from lmcot.actors.resources.cluster import check_plan
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import Packed, RolloutUnit
from lmcot.actors.weights import checksum, pack_weights
from lmcot.config import ActorsSettings, PolicySettings, PromptSettings, RoleSettings
from lmcot.errors import Interrupted, UserError
from lmcot.models.sources import load_model
from lmcot.records import Example

SMALL = RoleSettings(count=2, cpus=0.25)
SETTINGS = ActorsSettings(unit_timeout_s=30, start_timeout_s=90, max_attempts=3)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def worker_class() -> Any:
    """Made in a function, so that Ray sends the class itself, not this module's name."""

    class Worker(ActorBase):
        def __init__(self, folder: str) -> None:
            self.folder = Path(folder)
            self.greeting = "not set up"

        def setup(self) -> None:
            self.greeting = "ready"

        def greet(self, word: str) -> None:
            self.greeting = word

        def hello(self, unit: int) -> str:
            return f"{self.greeting} {unit}"

        def ready_hello(self, unit: int) -> str:
            if self.greeting == "not set up":
                from lmcot.actors.base import NotSetUp

                raise NotSetUp("it was started anew")
            return self.hello(unit)

        def once(self, unit: dict[str, Any]) -> tuple[int, str]:
            """Notes that it began; the first time, ends or hangs as the unit says."""
            began = self.folder / f"{unit['index']}"
            first = not began.exists()
            began.touch()
            if first and unit.get("die"):
                time.sleep(0.6)  # it has begun: sooner, the actor would count as dead before
                os.kill(os.getpid(), signal.SIGKILL)
            if first and unit.get("hang"):
                time.sleep(600)
            time.sleep(0.02)
            return unit["index"], self.greeting

        def refuse(self, unit: str) -> None:
            if unit == "user":
                raise UserError("the unit is wrong: mend it")
            raise ValueError("a bug")

    return Worker


Worker = worker_class()


def start(folder: Path, settings: ActorsSettings = SETTINGS, at_once: int = 1) -> Fleet[Any]:
    arguments = {"folder": str(folder)}
    fleet = Fleet("test", Worker, SMALL, settings, arguments=arguments, calls_at_once=at_once)
    fleet.wait_ready()
    return fleet


def test_results_come_in_the_order_of_the_units(tmp_path: Path) -> None:
    with start(tmp_path) as fleet:
        seen: list[int] = []
        units = list(range(9))
        results = fleet.map(Worker.hello, units, on_result=lambda index, _: seen.append(index))
        assert results == [f"ready {unit}" for unit in units]
        assert sorted(seen) == units


def test_a_killed_actors_unit_is_done_again_by_an_actor_set_up_as_the_others(
    tmp_path: Path,
) -> None:
    with start(tmp_path) as fleet:
        fleet.configure(Worker.greet, "version 7")
        units = [{"index": index, "die": index == 1} for index in range(6)]
        results = fleet.map(Worker.once, units)
        assert results == [(index, "version 7") for index in range(6)]
        # The restarted actor comes back only with what the fleet was told.
        deadline = time.monotonic() + 60
        while not fleet.recoveries and time.monotonic() < deadline:
            fleet.map(Worker.hello, [0])
            time.sleep(0.2)
        assert len(fleet.recoveries) == 1
        assert 0 < fleet.recoveries[0] < 60
        assert set(fleet.map(Worker.hello, [1] * 8)) == {"version 7 1"}


def test_an_actor_that_was_started_anew_unnoticed_is_set_up_first(tmp_path: Path) -> None:
    """It died without work, and Ray had it back before anybody asked."""
    with start(tmp_path) as fleet:
        ray.kill(fleet.handles[0], no_restart=False)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # nobody of the fleet looks meanwhile
            try:
                if ray.get(fleet.handles[0].ping.remote(), timeout=20) == "pong":
                    break
            except ray.exceptions.RayError:
                time.sleep(0.2)
        assert set(fleet.map(Worker.ready_hello, [1] * 6)) == {"ready 1"}


def test_an_actor_that_hangs_is_ended_and_its_unit_done_elsewhere(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"unit_timeout_s": 3.0})
    with start(tmp_path, settings) as fleet:
        started = time.monotonic()
        units = [{"index": index, "hang": index == 0} for index in range(4)]
        assert [index for index, _ in fleet.map(Worker.once, units)] == [0, 1, 2, 3]
        assert time.monotonic() - started < 30


def test_all_units_of_an_actor_that_takes_several_are_done_again(tmp_path: Path) -> None:
    """After its death and after its end for a unit that hangs; each result counts once."""
    settings = SETTINGS.model_copy(update={"unit_timeout_s": 4.0, "max_attempts": 5})
    with start(tmp_path, settings, at_once=3) as fleet:
        units = [{"index": index, "die": index == 0, "hang": index == 8} for index in range(12)]
        assert fleet.map(Worker.once, units) == [(index, "ready") for index in range(12)]
        assert fleet.lost >= 2
        assert fleet.refs() == []
        assert 0.0 <= fleet.idle_share() <= 1.0


def test_a_unit_that_kills_every_actor_ends_the_run_with_its_name(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_attempts": 1})
    lost = "unit once/0 was lost 1 times on test actors, the last time because .*: see Ray"
    with start(tmp_path, settings) as fleet, pytest.raises(RuntimeError, match=lost):
        fleet.map(Worker.once, [{"index": 0, "die": True}])


def test_errors_inside_an_actor_reach_the_driver_and_leave_it_healthy(tmp_path: Path) -> None:
    with start(tmp_path) as fleet:
        with pytest.raises(UserError, match="the unit is wrong: mend it"):
            fleet.map(Worker.refuse, ["user"])
        with pytest.raises(RuntimeError, match=r"the test actor failed: ValueError: a bug"):
            fleet.map(Worker.refuse, ["bug"])
        assert fleet.map(Worker.hello, [1]) == ["ready 1"]
        assert fleet.recoveries == []


def test_a_wait_can_be_abandoned(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise Interrupted

    fleet = Fleet(
        "test", Worker, SMALL, SETTINGS, arguments={"folder": str(tmp_path)},
        check=interrupt,
    )  # fmt: skip
    with fleet, pytest.raises(Interrupted):
        fleet.wait_ready()


def test_actors_that_cannot_start_are_named_when_the_time_is_up(tmp_path: Path) -> None:
    impossible = RoleSettings(count=1, cpus=64)
    settings = SETTINGS.model_copy(update={"start_timeout_s": 1.0})
    fleet = Fleet("test", Worker, impossible, settings, arguments={"folder": "."})
    with fleet, pytest.raises(TimeoutError, match="'setup' on 1 of 1 test actor"):
        fleet.wait_ready()


def test_actors_that_do_not_fit_are_refused_with_what_is_short() -> None:
    roles = {"rollout": RoleSettings(cpus=64), "reward": RoleSettings(cpus=0.5)}
    short = r"\(CPU: 64\.5 needed, 2 there\): use actors\.rollout\.cpus 1\.5 instead of 64"
    with pytest.raises(UserError, match=short):
        check_plan("test", roles, SETTINGS)
    check_plan("test", roles, SETTINGS.model_copy(update={"autoscaling": True}))
    check_plan("test", {"rollout": RoleSettings(cpus=2)}, SETTINGS)


def test_rollout_actors_take_up_published_weights() -> None:
    """[27] After a sync the checksums are equal; a unit of another version is refused."""
    policy = PolicySettings(source="random:counting-llama", dtype="float32", max_new_tokens=4)
    prompts = PromptSettings(templates="counting", demonstrations=0)
    model, _ = load_model(policy.source, "float32")
    with Fleet(
        "rollout", RolloutActor, SMALL, SETTINGS,
        arguments={"policy": policy, "source": policy.source, "prompts": prompts, "threads": 1},
    ) as fleet:  # fmt: skip
        fleet.wait_ready()
        assert fleet.call(RolloutActor.checksum) == [checksum(model)] * 2
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        weights = (ray.put(pack_weights(model.named_parameters(), nbytes, 3)),)

        question: Packed[tuple[Example, ...]] = Packed.of((Example("q", "13 14 15", "", ()),))

        def unit(version: int) -> RolloutUnit:
            return RolloutUnit(
                unit_id="u", questions=question, samples=2, temperature=1.0, max_new_tokens=4,
                seed=0, step=0, policy_version=version, weights=weights,
            )  # fmt: skip

        rollouts = [one.open() for one in fleet.map(RolloutActor.sample, [unit(3), unit(3)])]
        assert fleet.call(RolloutActor.checksum) == [checksum(model)] * 2
        assert [r.sample for r in rollouts[0]] == [0, 1]
        assert {r.policy_version for r in rollouts[0]} == {3}
        with pytest.raises(RuntimeError, match="wants policy version 2, but its weights are of"):
            fleet.map(RolloutActor.sample, [unit(2)])
