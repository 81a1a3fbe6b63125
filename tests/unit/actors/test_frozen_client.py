"""The policy of the frozen LM's client: time limits, actors that die, attempts; without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from lmcot.actors import frozen_client as module
from lmcot.actors.base import RemoteError, Unanswered
from lmcot.actors.frozen_client import FrozenClient
from lmcot.actors.units import PromptUnit
from lmcot.errors import Interrupted, UserError
from lmcot.frozen.cached import Replies
from lmcot.records import Message, Prompt, Sampling, Usage

GREEDY = Sampling(max_new_tokens=4)
LIMIT_S = 60.0


class Ref:
    """An object reference whose result is there at a time, or never."""

    def __init__(self, ready_at: float, result: Any) -> None:
        self.ready_at = ready_at
        self.result = result


class Actor:
    """An actor's handle: what it does with a call is decided by its ``plan``."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.plan: list[str] = []
        self.asked: list[str] = []
        self.ask = self
        self.describe = self

    def remote(self, *asked: Any) -> Ref:
        what = self.plan.pop(0) if self.plan else "reply"
        now = self.cluster.now
        if not asked:
            return Ref(now + 1, ("the model", 7))
        method, prompts, _ = asked
        self.asked.append(prompts[0][0].content)
        if what == "dead":
            return Ref(now, ActorDiedError())
        if what == "dies":
            return Ref(now + 5, ActorDiedError())
        if what == "hangs":
            return Ref(now + 1e9, None)
        if what == "refuses":
            return Ref(now + 1, RemoteError("no such model", "", "user"))
        said = [f"{method} by {self.name}" for _ in prompts]
        return Ref(now + 1, Replies(said, Usage(len(prompts), len(prompts), 3), 0.5))


class Cluster:
    """As much of Ray as the client uses, with a clock of its own."""

    def __init__(self, actors: int) -> None:
        self.now = 1000.0
        self.actors = [Actor(self, f"actor {number}") for number in range(actors)]
        self.killed: list[str] = []

    def wait(self, refs: Sequence[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        ready = [ref for ref in refs if ref.ready_at <= self.now]
        return ready, [ref for ref in refs if ref.ready_at > self.now]

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.result, Exception):
            raise ref.result
        return ref.result

    def kill(self, actor: Actor, *, no_restart: bool) -> None:
        assert not no_restart, "nobody would answer in its place"
        self.killed.append(actor.name)

    def monotonic(self) -> float:
        return self.now

    def pass_time(self, *_: Any) -> None:
        self.now += 0.25


Started = Callable[..., tuple[Cluster, FrozenClient]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    def start(actors: int = 2, **changes: Any) -> tuple[Cluster, FrozenClient]:
        cluster = Cluster(actors)
        for name in ("ray", "time"):
            monkeypatch.setattr(module, name, cluster)
        monkeypatch.setattr(module, "wait_for_news", cluster.pass_time)
        settings = {"limit_s": LIMIT_S, "attempts": 3} | changes
        return cluster, FrozenClient(cluster.actors, **settings)

    return start


def prompt(text: str) -> Prompt:
    return (Message("user", text),)


def answers(client: FrozenClient, text: str) -> list[Any]:
    return list(client.generate([prompt(text)], GREEDY))


def unit(text: str) -> PromptUnit:
    return PromptUnit("unit", (prompt(text),), GREEDY)


def test_calls_go_round_and_usage_counts_since_the_unit_began(started: Started) -> None:
    _, client = started()
    assert answers(client, "a") == ["generate by actor 0"]
    client.begin_unit()
    chosen: list[Any] = list(client.choose([prompt("b")] * 2, ("yes", "no")))
    assert chosen == ["choose by actor 1"] * 2
    scored: list[Any] = list(client.score([prompt("c")], ["x"]))
    assert scored == ["score by actor 0"]
    assert (client.usage, client.seconds) == (Usage(3, 3, 6), 1.0)
    assert (client.identity, client.parameters) == ("the model", 7)


def test_each_actor_has_one_unit_at_a_time_and_replies_keep_their_order(started: Started) -> None:
    cluster, client = started()
    cluster.actors[0].plan = ["dies"]
    most, told = 0, []

    def keep(index: int, replies: Replies) -> None:
        nonlocal most
        most = max(most, len(client.refs()))
        told.append(index)

    units = [unit(str(number)) for number in range(5)]
    replies = client.map(units, on_result=keep)
    assert len(replies) == 5
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert told != sorted(told), "the one that was lost came later"
    assert most == 2
    assert sorted(cluster.actors[0].asked + cluster.actors[1].asked) == list("001234")


def test_an_actor_that_dies_costs_an_attempt(started: Started) -> None:
    cluster, client = started()
    cluster.actors[0].plan = ["dies"]
    assert answers(client, "a") == ["generate by actor 1"]
    assert cluster.killed == []
    for actor in cluster.actors:
        actor.plan = ["dies", "dies"]
    with pytest.raises(Unanswered, match=r"no frozen-LM actor replied to 'generate' \(3 attempts"):
        client.generate([prompt("b")], GREEDY)


def test_actors_that_are_being_restarted_cost_time_only(started: Started) -> None:
    cluster, client = started()
    for actor in cluster.actors:
        actor.plan = ["dead"] * 10
    assert answers(client, "a") == ["generate by actor 0"]
    assert cluster.now < 1000 + LIMIT_S
    for actor in cluster.actors:
        actor.plan = ["dead"] * 1000
    began = cluster.now
    with pytest.raises(Unanswered, match="0 attempts in 60 s at most each; the last failed becaus"):
        client.generate([prompt("b")], GREEDY)
    assert LIMIT_S <= cluster.now - began < LIMIT_S + 2


def test_an_actor_that_hangs_is_killed_and_another_one_asked(started: Started) -> None:
    cluster, client = started()
    cluster.actors[0].plan = ["hangs"]
    assert answers(client, "a") == ["generate by actor 1"]
    assert cluster.killed == ["actor 0"]


def test_the_calls_of_a_unit_share_its_time(started: Started) -> None:
    """The reward fleet does the unit again: nobody waits for a second time limit."""
    cluster, client = started()
    client.begin_unit()
    cluster.now += LIMIT_S - 10
    cluster.actors[0].plan = ["hangs"]
    with pytest.raises(
        UserError, match=r"a work unit in 60 s \(at 'choose'\): raise actors.unit_timeout_s or"
    ) as caught:
        client.choose([prompt("a")], ("yes", "no"))
    assert isinstance(caught.value, Unanswered)
    assert cluster.now == pytest.approx(1000 + LIMIT_S, abs=1)
    assert cluster.killed == ["actor 0"]
    client.begin_unit()
    assert answers(client, "b") == ["generate by actor 1"]


def test_a_long_queue_is_no_reason_to_give_up(started: Started) -> None:
    """Time limits are of the calls that an actor has."""
    cluster, client = started(1, limit_s=3)
    assert len(client.map([unit(str(number)) for number in range(20)])) == 20
    assert cluster.killed == []


def test_what_an_actor_refuses_is_raised(started: Started) -> None:
    cluster, client = started()
    cluster.actors[0].plan = ["refuses"]
    with pytest.raises(UserError, match="no such model"):
        client.generate([prompt("a")], GREEDY)


def test_units_in_the_background_are_dropped_when_they_are_abandoned(started: Started) -> None:
    cluster, client = started(1)
    client.submit("a", unit("a"))
    client.submit("b", unit("b"))
    assert client.turn() == []
    client.abandon()
    client.submit("c", unit("c"))
    assert client.turn() == [], "the actor is at the unit that was abandoned"
    assert cluster.actors[0].asked == ["a"]
    cluster.now += 2
    assert client.turn() == []
    cluster.now += 2
    ((key, replies),) = client.turn()
    assert (key, replies.results) == ("c", ["generate by actor 0"])
    assert cluster.actors[0].asked == ["a", "c"]


def test_an_interrupted_wait_leaves_no_call_behind(started: Started) -> None:
    def interrupt() -> None:
        if cluster.now > 1000:
            raise Interrupted

    cluster, client = started(check=interrupt)
    cluster.actors[0].plan = ["hangs"]
    with pytest.raises(Interrupted):
        client.map([unit("a"), unit("b"), unit("c")])
    cluster.now += 2
    assert client.turn() == []
