"""Calls name a method by the function itself: who renames it, or its arguments, is told by mypy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, assert_type

import pytest

from benchmarks.fake_ray import StandIn, faked
from lmcot.actors.fleet import Fleet
from lmcot.actors.learner_actor import LearnerActor
from lmcot.actors.learner_group import LearnerGroup, LearnerLost
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import RolloutUnit
from lmcot.config import ActorsSettings, RoleSettings, parse_config
from lmcot.learner.plan import refine_plan

if TYPE_CHECKING:

    def mypy_refuses_these(
        group: LearnerGroup,
        fleet: Fleet[RolloutActor],
        unit: RolloutUnit,
        then: Callable[[str, int], None],
    ) -> None:
        """An ignore that ignores nothing is an error, so each line is one without it."""
        group.call(LearnerActor.renamed)  # type: ignore[attr-defined]
        group.call("updates")  # type: ignore[arg-type]
        group.begin(LearnerActor.publish, "7")  # type: ignore[arg-type]
        group.begin(LearnerActor.ppo_step, step=7)  # type: ignore[call-arg]
        fleet.submit(RolloutActor.renamed, "key", unit, print)  # type: ignore[attr-defined]
        fleet.submit(RolloutActor.sample, "key", 7, print)  # type: ignore[arg-type]
        fleet.submit(RolloutActor.sample, "key", unit, then)  # type: ignore[misc]
        fleet.submit_split(RolloutActor.sample, "key", unit, print, kept=1)  # type: ignore[arg-type]
        fleet.map(LearnerActor.updates, [])  # type: ignore[arg-type]


class _Learner(StandIn):
    def updates(self) -> int:
        return 7

    def publish(self, version: int) -> tuple[Any, ...]:
        return (f"weights of version {version}",)


class _Rollout(StandIn):
    word = ""

    def use_source(self, source: str) -> None:
        self.word = source

    def sample(self, unit: RolloutUnit) -> str:
        return f"{self.word} {unit}"

    def checksum(self) -> int:
        return len(self.word)


def test_a_call_to_the_learners_has_a_result_of_each_rank() -> None:
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama", "max_new_tokens": 4},
            "rewards": {"kind": "increasing"},
            "prompts": {"templates": "counting", "demonstrations": 0},
            "refine": {"start_from": "base"},
            "actors": {"learner": {"count": 2}},
        }
    )
    group = LearnerGroup(config, refine_plan(config, "random:llama", 1))
    with pytest.raises(LearnerLost, match="no learners to call 'updates' on"):
        group.call(LearnerActor.updates)
    with faked({"LearnerActor": _Learner}), pytest.MonkeyPatch.context() as patched:
        patched.setattr(_Learner, "meeting", lambda _: ("here", 1), raising=False)
        with group:
            group.wait_ready()
            assert assert_type(group.call(LearnerActor.updates), list[int]) == [7, 7]
            for pending in (
                group.begin(LearnerActor.publish, 3),
                group.begin(LearnerActor.publish, version=3),
            ):
                assert pending.result() == [("weights of version 3",)] * 2


def test_a_call_to_a_fleet_goes_to_each_actor_and_a_unit_to_one() -> None:
    settings = ActorsSettings()
    with (
        faked({"RolloutActor": _Rollout}),
        Fleet("rollout", RolloutActor, RoleSettings(count=2), settings, arguments={}) as fleet,
    ):
        fleet.wait_ready()
        fleet.configure(RolloutActor.use_source, "words")
        assert assert_type(fleet.call(RolloutActor.checksum), list[int]) == [5, 5]
        units: Any = ["a", "b", "c"]
        assert fleet.map(RolloutActor.sample, units) == ["words a", "words b", "words c"]  # type: ignore[comparison-overlap]
