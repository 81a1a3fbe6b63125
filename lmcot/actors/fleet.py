"""A fleet of actors of one role, and the work that goes through it.

RLlib's `FaultTolerantActorManager` keeps the actors: calls, health probes, restarts. It never
marks a slow actor unhealthy and drops requests above its bound, so work goes through a ledger of
our own: the fleet sends one unit at a time to each actor, watches the deadline itself, and asks a
lost unit again elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from lmcot.actors.base import ActorBase, RemoteError, Unanswered
from lmcot.actors.ledger import Assignment, Ledger, UnitLost
from lmcot.actors.news import LONGEST_WAIT_S, wait_for_news
from lmcot.actors.resources.placement import Placement
from lmcot.actors.upkeep import Upkeep
from lmcot.config import ActorsSettings, RoleSettings
from lmcot.errors import first_line
from lmcot.monitor.progress import say

_LOOK_EVERY_S = 0.25


class Fleet:
    """Actors of one role. Use as a context manager: they are gone at the end."""

    def __init__(
        self,
        role: str,
        actor_class: type[ActorBase],
        resources: RoleSettings,
        settings: ActorsSettings,
        *,
        arguments: dict[str, Any],
        calls_at_once: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the actors; `wait_ready` waits for them.

        Args:
            arguments: keyword arguments of the actor's constructor.
            calls_at_once: how many calls one actor works on at the same time, in threads.
            check: called while waiting; raises to abandon the wait.
        """
        self.role = role
        self._settings = settings
        self._check = check
        self._placement = Placement(role, resources)
        remote = ray.remote(actor_class)
        self.handles = [
            remote.options(
                **self._placement.options(number),
                max_restarts=-1,
                max_concurrency=calls_at_once,
            ).remote(**arguments)
            for number in range(resources.count)
        ]
        self._manager = FaultTolerantActorManager(
            self.handles, max_remote_requests_in_flight_per_actor=1
        )
        self._upkeep = Upkeep(role, self._manager, self._unwrap, settings.start_timeout_s)
        self._ledger: Ledger[str] = Ledger(
            settings.max_attempts, settings.unit_timeout_s, actors=resources.count
        )
        self._refs: dict[Any, Assignment[str]] = {}
        self._looked = -math.inf
        self._none_since: float | None = None
        self._busy_s = 0.0
        self._asked = time.monotonic()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all actors."""
        self._manager.clear()
        self._placement.remove()

    @property
    def recoveries(self) -> list[float]:
        """Seconds from each loss of an actor to its return into service."""
        return self._upkeep.recoveries

    @property
    def waiting(self) -> int:
        """Units that no actor has yet."""
        return self._ledger.waiting

    @property
    def lost(self) -> int:
        """Attempts at units that came to nothing."""
        return self._ledger.lost

    def open(self) -> list[str]:
        """Keys of the units that are not done."""
        return self._ledger.open

    def refs(self) -> list[Any]:
        """Units underway: what a wait for news of this fleet waits for."""
        return list(self._refs)

    def idle_share(self) -> float:
        """Share of the actors' time since the last call in which they had no unit."""
        now = time.monotonic()
        busy = self._busy_s + sum(self._seconds(one, now) for one in self._refs.values())
        available = (now - self._asked) * len(self.handles)
        self._busy_s, self._asked = 0.0, now
        return max(0.0, 1 - busy / available) if available else 0.0

    def _seconds(self, assignment: Assignment[str], now: float) -> float:
        return now - max(assignment.since, self._asked)

    def wait_ready(self, **setup: Any) -> None:
        """Waits until each actor has set itself up, and says what their ``setup`` returned.

        Args:
            setup: keyword arguments of the actor's ``setup``.

        Raises:
            UserError: if an actor cannot start for a reason that is the user's to mend.
            TimeoutError: naming the role, after ``actors.start_timeout_s``.
        """
        limit = self._settings.start_timeout_s
        for notice in dict.fromkeys(self.call("setup", timeout_s=limit, restored=True, **setup)):
            if notice:
                say(f"{self.role} actors: {notice}")

    def call(
        self, method: str, *, timeout_s: float | None = None, restored: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Calls a method on every healthy actor; results in the order of the actors.

        Args:
            restored: whether an actor that was restarted gets this call again (the latest one of
                each method), before it gets work. Then one that is lost meanwhile is no error,
                as long as there are others.

        Raises:
            TimeoutError, RuntimeError: naming the role and the method.
        """
        limit = timeout_s or self._settings.unit_timeout_s
        if restored:
            self._upkeep.remember(method, kwargs)
        sent = self._manager.foreach_actor_async(method, tag=method, kwargs=kwargs)
        results: dict[int, Any] = {}
        lost = ""
        deadline = time.monotonic() + limit
        while sent:
            self._check()
            for result in self._manager.fetch_ready_async_reqs(
                tags=method, timeout_seconds=LONGEST_WAIT_S
            ):
                sent -= 1
                if result.ok:
                    results[result.actor_id] = self._unwrap(result.get())
                    continue
                lost = first_line(result.get())
                self._upkeep.lost(result.actor_id, lost)
            if sent and time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {limit:.0f} s for '{method}' on {sent} of "
                    f"{self._manager.num_actors()} {self.role} actor(s): check that the cluster "
                    "has the resources that 'actors' asks for, or raise the time limit there"
                )
        if lost and not (restored and results):
            raise RuntimeError(f"a {self.role} actor was lost during '{method}': {lost}")
        return [results[actor] for actor in sorted(results)]

    def submit(self, method: str, key: str, unit: Any, *, has_time: bool = False) -> None:
        """Takes a unit on: some actor's ``method`` will be called with it. See `turn`.

        Args:
            has_time: whether it is done only where no other unit waits for an actor.
        """
        self._ledger.add(key, (method, unit), has_time=has_time)

    def abandon(self) -> None:
        """Forgets all units; results that still come are dropped."""
        self._ledger.abandon()

    def turn(self) -> list[tuple[str, Any]]:
        """Results that came, by key; gives out more work. Never waits.

        A unit whose actor died or overran its time limit is done again, up to
        ``actors.max_attempts`` times.

        Raises:
            UnitLost: if a unit cannot be done.
            UserError, RuntimeError: what an actor refused, or failed at.
            TimeoutError: if no actor came back for ``actors.start_timeout_s``.
        """
        results = self._harvest()
        now = time.monotonic()
        # There is a turn for each result: what goes through all actors is not done in each.
        if now - self._looked > _LOOK_EVERY_S:
            self._looked = now
            self._end_overdue()
            self._upkeep.look(self._ledger.idle(self._manager.healthy_actor_ids()))
            self._check_somebody_is_there()
        if self._ledger.waiting:
            for actor in self._ledger.idle(self._manager.healthy_actor_ids()):
                if given := self._ledger.assign(actor, time.monotonic()):
                    method, unit = given.entry.unit
                    self._refs[self.handles[actor].apply.remote(method, unit=unit)] = given
        return results

    def map(
        self,
        method: str,
        units: Sequence[Any],
        *,
        on_result: Callable[[int, Any], None] = lambda index, result: None,
    ) -> list[Any]:
        """Does every unit once, on whichever actor is free; results in the order of the units.

        Args:
            on_result: told each unit's index and result as they come.

        Raises: as `turn` does.
        """
        numbers = {f"{method}/{index}": index for index in range(len(units))}
        for key, index in numbers.items():
            self.submit(method, key, units[index])
        results: dict[int, Any] = {}
        try:
            while len(results) < len(units):
                self._check()
                for key, value in self.turn():
                    results[numbers[key]] = value
                    on_result(numbers[key], value)
                if len(results) < len(units):
                    wait_for_news(self)
        finally:
            self.abandon()
        return [results[index] for index in range(len(units))]

    def _harvest(self) -> list[tuple[str, Any]]:
        if not self._refs:
            return []
        ready, _ = ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        results = []
        for ref in ready:
            assignment = self._take(ref)
            try:
                value = ray.get(ref)
            except RayError as error:
                self._lose(assignment, first_line(error))
                continue
            if isinstance(value, RemoteError) and value.kind == "unanswered":
                self._retry(assignment, value)
            elif isinstance(value, RemoteError) and value.kind == "not set up":
                self._lose(assignment, value.message)
            elif self._ledger.settle(assignment):
                results.append((assignment.entry.key, self._unwrap(value)))
        return results

    def _take(self, ref: Any) -> Assignment[str]:
        """Takes a call off the books."""
        assignment = self._refs.pop(ref)
        self._busy_s += self._seconds(assignment, time.monotonic())
        return assignment

    def _end_overdue(self) -> None:
        """Only its end frees an actor that hangs; Ray starts it anew."""
        limit = self._settings.unit_timeout_s
        for assignment in self._ledger.overdue(time.monotonic()):
            ray.kill(self.handles[assignment.actor], no_restart=False)
            self._take(next(ref for ref, one in self._refs.items() if one is assignment))
            self._lose(assignment, f"it took longer than actors.unit_timeout_s, {limit:g} s")

    def _lose(self, assignment: Assignment[str], reason: str) -> None:
        self._upkeep.lost(assignment.actor, reason)
        try:
            self._ledger.lose(assignment, time.monotonic())
        except UnitLost as lost:
            raise UnitLost(
                f"{lost} on {self.role} actors, the last time because {reason}: see Ray's logs "
                "for why they die"
            ) from None

    def _retry(self, assignment: Assignment[str], error: RemoteError) -> None:
        """The actor is well, but what it needed of another one did not come."""
        say(f"{self.role} actor {assignment.actor}: {error.message}; the unit is tried again")
        try:
            self._ledger.lose(assignment, time.monotonic())
        except UnitLost:
            raise Unanswered(error.message) from None

    def _check_somebody_is_there(self) -> None:
        if self._manager.num_healthy_actors() or not self._ledger.waiting:
            self._none_since = None
            return
        limit, now = self._settings.start_timeout_s, time.monotonic()
        self._none_since = self._none_since or now
        if now - self._none_since > limit:
            raise TimeoutError(
                f"waited {limit:.0f} s for one of {len(self.handles)} {self.role} actor(s) to "
                "come back: check that the cluster still has the resources that "
                "'actors' asks for, or raise actors.start_timeout_s"
            )

    def _unwrap(self, value: Any) -> Any:
        if isinstance(value, RemoteError):
            raise value.to_exception(f"{self.role} actor")
        return value
