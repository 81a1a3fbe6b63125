"""Actors that are lost, and how they come back: without Ray, by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.actors.base import RemoteError
from lmcot.actors.upkeep import Upkeep
from lmcot.errors import UserError


class Result:
    """What RLlib's manager gives for a call."""

    def __init__(self, actor_id: int, value: Any, ok: bool = True) -> None:
        self.actor_id, self.value, self.ok = actor_id, value, ok

    def get(self) -> Any:
        return self.value


class FakeManager:
    """Keeps who is healthy, what was called, and what comes back."""

    def __init__(self) -> None:
        self.healthy = {0: True, 1: True}
        self.called: list[tuple[str, int, dict[str, Any]]] = []
        self.ready: dict[str, list[Result]] = {}

    def actors(self) -> dict[int, str]:
        return {0: "actor 0", 1: "actor 1"}

    def set_actor_state(self, actor: int, healthy: bool) -> None:
        self.healthy[actor] = healthy

    def is_actor_healthy(self, actor: int) -> bool:
        return self.healthy[actor]

    def foreach_actor_async(
        self,
        method: str,
        tag: str,
        remote_actor_ids: list[int],
        kwargs: dict[str, Any] | None = None,
        healthy_only: bool = True,
    ) -> None:
        self.called += [(method, actor, kwargs or {}) for actor in remote_actor_ids]

    def fetch_ready_async_reqs(self, tags: str) -> list[Result]:
        return self.ready.pop(tags, [])


class Stand:
    """An upkeep of two actors that are set up by two calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.killed: list[str] = []
        monkeypatch.setattr("lmcot.actors.upkeep.time.monotonic", lambda: self.now)
        monkeypatch.setattr("ray.kill", lambda one, no_restart: self.killed.append(one))
        self.manager = FakeManager()
        self.upkeep = Upkeep("test", self.manager, limit_s=60.0)
        self.upkeep.remember("setup", {"handles": 1})
        self.upkeep.remember("greet", {"word": "old"})
        self.upkeep.remember("greet", {"word": "new"})

    def look(self, seconds: float = 1.5, *answers: Result, tag: str = "revive/0") -> list[Any]:
        """What is called after some time, when those answers have come."""
        self.now += seconds
        self.manager.ready[tag] = list(answers)
        before = len(self.manager.called)
        self.upkeep.look(actor for actor, well in self.manager.healthy.items() if well)
        return [call for call in self.manager.called[before:] if call[1] == 0]


def test_an_actor_comes_back_once_it_is_set_up_as_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(monkeypatch)
    stand.upkeep.lost(0, "it was killed")
    assert not stand.manager.healthy[0]
    assert stand.look() == [("ping", 0, {})]
    assert stand.look(0.5, Result(0, "restarting", ok=False)) == [], "not at once again"
    assert stand.look() == [("ping", 0, {})]
    assert stand.look(1.5, Result(0, "pong")) == [("setup", 0, {"handles": 1})]
    assert stand.look(1.5, Result(0, None)) == [("greet", 0, {"word": "new"})]
    assert not stand.manager.healthy[0], "no work before it is set up"
    stand.look(1.5, Result(0, None))
    assert stand.manager.healthy[0]
    assert stand.upkeep.recoveries == [8.0]
    said = capsys.readouterr().err
    assert "test actor 0 was lost (it was killed); Ray restarts it" in said
    assert "test actor 0 is back 8.0 s after it was lost" in said


def test_what_its_setup_waits_for_may_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch)
    stand.upkeep.lost(0, "x")
    stand.look()
    stand.look(1.5, Result(0, "pong"))
    stand.look(1.0, Result(0, RemoteError("the other is not there", "", "unanswered")))
    assert stand.look() == [("ping", 0, {})], "from the beginning"


def test_what_its_setup_refuses_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch)
    stand.upkeep.lost(0, "x")
    stand.look()
    stand.look(1.5, Result(0, "pong"))
    with pytest.raises(UserError, match="the model is gone"):
        stand.look(1.5, Result(0, RemoteError("the model is gone", "", "user")))


def test_one_that_hangs_while_it_is_set_up_is_ended_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch)
    stand.upkeep.lost(0, "x")
    stand.look()
    assert stand.look(1.5, Result(0, "pong")) == [("setup", 0, {"handles": 1})]
    stand.look(59.0)
    assert stand.killed == []
    assert stand.look(2.0) == [("ping", 0, {})]
    assert stand.killed == ["actor 0"]


def test_the_death_of_one_without_work_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(monkeypatch)
    assert stand.look(6.0) == [("ping", 0, {})]
    dead = Result(0, "the actor died\nand more", ok=False)
    assert stand.look(0.5, dead, tag="watch") == [("ping", 0, {})]
    assert "test actor 0 was lost (the actor died); Ray" in capsys.readouterr().err
    assert not stand.manager.healthy[0]
