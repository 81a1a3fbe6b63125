"""Keeps a fleet's actors in service: notices dead ones, and sets up those that Ray restarted.

RLlib's `FaultTolerantActorManager` knows who is healthy and makes the calls; nothing here waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from lmcot.actors.base import RemoteError, unwrap
from lmcot.errors import first_line
from lmcot.monitor.progress import say

_WATCH_EVERY_S = 5.0
_REVIVE_EVERY_S = 1.0
_WATCH = "watch"

Call = tuple[str, dict[str, Any]]
"""A method and its keyword arguments."""


class Upkeep:
    """Watches the actors that have no work, and sets up those that were restarted."""

    def __init__(
        self,
        role: str,
        manager: FaultTolerantActorManager,
        limit_s: float,
    ) -> None:
        """Begins with all actors in service.

        Args:
            limit_s: time limit of one call that sets up a restarted actor.
        """
        self._role = role
        self._manager = manager
        self._limit_s = limit_s
        self._setup: list[Call] = []
        self._lost_at: dict[int, float] = {}
        self._asked_at: dict[int, float] = {}
        self._reviving: dict[int, int] = {}
        self._watched = time.monotonic()
        self.recoveries: list[float] = []
        """Seconds from each loss of an actor to its return into service."""

    def remember(self, method: str, kwargs: dict[str, Any]) -> None:
        """Repeats this call on each restarted actor before its work; the latest of each method."""
        self._setup = [call for call in self._setup if call[0] != method]
        self._setup.append((method, kwargs))

    def lost(self, actor: int, reason: str) -> None:
        """Takes an actor out of service."""
        self._manager.set_actor_state(actor, healthy=False)
        self._reviving.pop(actor, None)
        if actor not in self._lost_at:
            self._lost_at[actor] = time.monotonic()
            say(f"{self._role} actor {actor} was lost ({reason}); Ray restarts it")

    def look(self, idle: Iterable[int]) -> None:
        """Reads the answers to earlier probes and setups, and sends the next ones.

        Args:
            idle: healthy actors without work, whose death would go unnoticed.
        """
        now = time.monotonic()
        self._watch(list(idle), now)
        for actor in [one for one in self._lost_at if one in self._reviving]:
            self._follow(actor)
            if actor in self._reviving and now - self._asked_at[actor] > self._limit_s:
                ray.kill(self._manager.actors()[actor], no_restart=False)
                self.lost(actor, "it hung during its setup")
        for actor in self._lost_at:
            if actor not in self._reviving and now - self._asked_at.get(actor, 0) > _REVIVE_EVERY_S:
                self._ask(actor, 0)

    def _watch(self, idle: Sequence[int], now: float) -> None:
        for result in self._manager.fetch_ready_async_reqs(tags=_WATCH):
            if not result.ok:
                self.lost(result.actor_id, first_line(result.get()))
        if idle and now - self._watched > _WATCH_EVERY_S:
            self._watched = now
            alive = [one for one in idle if self._manager.is_actor_healthy(one)]
            if alive:
                self._manager.foreach_actor_async("ping", tag=_WATCH, remote_actor_ids=alive)

    def _ask(self, actor: int, number: int) -> None:
        """Makes the next call to a lost actor: a ping, then the calls that set it up."""
        method, kwargs = [("ping", {}), *self._setup][number]
        self._reviving[actor] = number
        self._asked_at[actor] = time.monotonic()
        self._manager.foreach_actor_async(
            method,
            tag=_tag(actor),
            kwargs=kwargs,
            remote_actor_ids=[actor],
            healthy_only=False,
        )

    def _follow(self, actor: int) -> None:
        for result in self._manager.fetch_ready_async_reqs(tags=_tag(actor)):
            number = self._reviving.pop(actor)
            if not result.ok:
                return  # not restarted yet, or lost again: asked again in a while
            value = result.get()
            if isinstance(value, RemoteError) and value.kind == "unanswered":
                return
            unwrap(value, self._role)
            if number < len(self._setup):
                self._ask(actor, number + 1)
                return
            self._manager.set_actor_state(actor, healthy=True)
            seconds = time.monotonic() - self._lost_at.pop(actor)
            self.recoveries.append(seconds)
            say(f"{self._role} actor {actor} is back {seconds:.1f} s after it was lost")


def _tag(actor: int) -> str:
    return f"revive/{actor}"
