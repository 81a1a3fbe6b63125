"""A fleet of actors of one role, and the work that goes through it.

RLlib's `FaultTolerantActorManager` keeps the actors: calls, health probes, restarts. It never
marks a slow actor unhealthy and drops requests above its bound, so work goes through a ledger of
our own: the fleet sends each actor one unit at a time, or as many as it batches, watches the
deadline itself, and retries a lost unit on another actor.

A method is named by the function itself (``fleet.submit(RolloutActor.sample, key, unit)``), so that
the type checker sees its unit and result.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from lmcot.actors.base import ActorBase, RemoteError, Unanswered, unwrap
from lmcot.actors.calls import Call, Calls, Order
from lmcot.actors.kept import Kept, Split
from lmcot.actors.ledger import Assignment, Ledger, UnitLost
from lmcot.actors.news import LONGEST_WAIT_S, wait_for_news
from lmcot.actors.resources.placement import Placement
from lmcot.actors.upkeep import Upkeep
from lmcot.config import ActorsSettings, RoleSettings
from lmcot.errors import first_line
from lmcot.monitor.progress import say

_Actor = TypeVar("_Actor", bound=ActorBase)
_Arguments = ParamSpec("_Arguments")
_Unit = TypeVar("_Unit")
_Result = TypeVar("_Result")
_LOOK_EVERY_S = 0.25


class Fleet(Generic[_Actor]):
    """Actors of one role. Use as a context manager, which ends them."""

    def __init__(
        self,
        role: str,
        actor_class: type[_Actor],
        resources: RoleSettings,
        settings: ActorsSettings,
        *,
        arguments: dict[str, Any],
        calls_at_once: int = 1,
        guest: RoleSettings | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the actors; `wait_ready` waits for them.

        Args:
            arguments: keyword arguments of the actor's constructor.
            calls_at_once: how many calls one actor works on at the same time, in threads, and so
                how many units it gets.
            guest: a role of which each actor is to have room beside one of these.
            check: called while waiting; raises to abandon the wait.
        """
        self.role = role
        self._settings = settings
        self._check = check
        self.placement = Placement(role, resources, guest=guest)
        remote = ray.remote(actor_class)
        self.handles = [
            remote.options(
                **self.placement.options(number),
                max_restarts=-1,
                max_concurrency=calls_at_once,
            ).remote(**arguments)
            for number in range(resources.count)
        ]
        self._manager = FaultTolerantActorManager(
            self.handles, max_remote_requests_in_flight_per_actor=1
        )
        self._upkeep = Upkeep(role, self._manager, settings.start_timeout_s)
        self._ledger = Ledger(
            settings.max_attempts,
            settings.unit_timeout_s,
            actors=resources.count,
            at_once=calls_at_once,
        )
        self._calls = Calls()
        self._looked = -math.inf
        self._none_since: float | None = None

    def __enter__(self) -> Fleet[_Actor]:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all actors."""
        self._manager.clear()
        self.placement.remove()

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
        """Attempts at units that failed."""
        return self._ledger.lost

    def refs(self) -> list[Any]:
        """Units in flight: what a wait for news of this fleet waits for."""
        return self._calls.refs()

    def idle_share(self) -> float:
        """Share of the actors' time since the last call in which they had no unit."""
        return self._calls.idle_share(len(self.handles))

    def wait_ready(self, **setup: Any) -> None:
        """Waits until each actor is set up, and prints what their ``setup`` returned.

        Args:
            setup: keyword arguments of the actor's ``setup``.

        Raises:
            UserError: if an actor cannot start for a reason that the user can fix.
            TimeoutError: naming the role, after ``actors.start_timeout_s``.
        """
        limit = self._settings.start_timeout_s
        for notice in dict.fromkeys(self._call_all("setup", setup, limit, repeated=True)):
            if notice:
                say(f"{self.role} actors: {notice}")

    def call(
        self,
        method: Callable[Concatenate[_Actor, _Arguments], _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> list[_Result]:
        """Calls a method on every healthy actor; results in the order of the actors.

        Raises:
            TimeoutError, RuntimeError: naming the role and the method.
        """
        limit = self._settings.unit_timeout_s
        return self._call_all(method.__name__, _named(method, args, kwargs), limit, repeated=False)

    def configure(
        self,
        method: Callable[Concatenate[_Actor, _Arguments], _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> list[_Result]:
        """Makes a call on every actor, and again on each that is restarted later, before its work.

        A later call of the same method replaces this one. An actor that is lost meanwhile is no
        error, as long as there are others.

        Raises: as `call` does.
        """
        limit = self._settings.unit_timeout_s
        return self._call_all(method.__name__, _named(method, args, kwargs), limit, repeated=True)

    def tell(self, method: Callable[[_Actor], None]) -> None:
        """Makes a call on every healthy actor; one that is lost meanwhile is no error."""
        self._call_all(
            method.__name__, {}, self._settings.unit_timeout_s, repeated=False, needed=False
        )

    def _call_all(
        self,
        method: str,
        kwargs: dict[str, Any],
        limit: float,
        *,
        repeated: bool,
        needed: bool = True,
    ) -> list[Any]:
        if repeated:
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
                    results[result.actor_id] = unwrap(result.get(), self.role)
                    continue
                lost = first_line(result.get())
                self._upkeep.lost(result.actor_id, lost)
            if sent and time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {limit:.0f} s for '{method}' on {sent} of "
                    f"{self._manager.num_actors()} {self.role} actor(s): check that the cluster "
                    "has the resources that 'actors' asks for, or raise the time limit there"
                )
        if lost and needed and not (repeated and results):
            raise RuntimeError(f"a {self.role} actor was lost during '{method}': {lost}")
        return [results[actor] for actor in sorted(results)]

    def submit(
        self,
        method: Callable[[_Actor, _Unit], _Result],
        key: str,
        unit: _Unit,
        then: Callable[[str, _Result], None],
        *,
        low_priority: bool = False,
    ) -> None:
        """Queues a unit for whichever actor is free.

        Args:
            then: called by `turn` with the key and the result.
            low_priority: run it only when no other unit waits for an actor.
        """
        order = Order(method.__name__, unit, then)
        self._ledger.add(key, order, low_priority=low_priority)

    def submit_split(
        self,
        method: Callable[[_Actor, _Unit], Split[_Result]],
        key: str,
        unit: _Unit,
        then: Callable[[str, _Result, tuple[Kept[Any], ...]], None],
        *,
        kept: int,
    ) -> None:
        """Queues a unit of whose result the driver receives one part only.

        Args:
            then: called by `turn` with the key, that part, and the values that are kept.
            kept: number of these values.
        """
        self._ledger.add(key, Order(method.__name__, unit, then, kept))

    def abandon(self) -> None:
        """Forgets all units; results that arrive later are dropped."""
        self._ledger.abandon()

    def turn(self) -> None:
        """Hands on the results that have arrived, and gives out more work; never waits.

        A unit whose actor died or overran its time limit is retried, up to
        ``actors.max_attempts`` times.

        Raises:
            UnitLost: if a unit cannot be done.
            UserError, RuntimeError: what an actor refused, or failed at.
            TimeoutError: if no actor came back for ``actors.start_timeout_s``.
        """
        results = self._harvest()
        self.keep_up()
        if self._ledger.waiting:
            self._give_out()
        for call, value in results:
            rest = (call.kept,) if call.order.kept else ()
            call.order.then(call.assignment.entry.key, value, *rest)

    def _give_out(self) -> None:
        """Gives units to the healthy actors that have room, evenly."""
        while (actor := self._ledger.freest(self._manager.is_actor_healthy)) is not None:
            given = self._ledger.assign(actor, time.monotonic())
            if given is None:
                return
            self._calls.send(self.handles[actor], given)

    def keep_up(self) -> None:
        """Kills actors that hang, notices the dead and sets up the restarted ones; never waits.

        `turn` does this too. It runs once per result, so per-actor scans are rate-limited.

        Raises:
            TimeoutError: if no actor came back for ``actors.start_timeout_s``.
        """
        now = time.monotonic()
        if now - self._looked <= _LOOK_EVERY_S:
            return
        self._looked = now
        self._end_overdue()
        self._upkeep.look(self._ledger.idle(self._manager.healthy_actor_ids()))
        self._check_somebody_is_there()

    def map(
        self,
        method: Callable[[_Actor, _Unit], _Result],
        units: Sequence[_Unit],
        *,
        on_result: Callable[[int, _Result], None] = lambda index, result: None,
    ) -> list[_Result]:
        """Does every unit once, on whichever actor is free; results in the order of the units.

        Args:
            on_result: called with each unit's index and result as they arrive.

        Raises: as `turn` does.
        """
        results: dict[int, _Result] = {}

        def keep(key: str, result: _Result) -> None:
            index = int(key.rpartition("/")[2])
            results[index] = result
            on_result(index, result)

        for index, unit in enumerate(units):
            self.submit(method, f"{method.__name__}/{index}", unit, keep)
        try:
            while len(results) < len(units):
                self._check()
                self.turn()
                if len(results) < len(units):
                    wait_for_news(self)
        finally:
            self.abandon()
        return [results[index] for index in range(len(units))]

    def _harvest(self) -> list[tuple[Call, Any]]:
        results = []
        for call in self._calls.take_ready():
            assignment = call.assignment
            try:
                value = ray.get(call.ref)
            except RayError as error:
                self._lose(assignment, first_line(error))
                continue
            if isinstance(value, RemoteError) and value.kind == "unanswered":
                self._retry(assignment, value)
            elif isinstance(value, RemoteError) and value.kind == "not set up":
                self._lose(assignment, value.message)
            elif self._ledger.settle(assignment):
                results.append((call, unwrap(value, self.role)))
        return results

    def _end_overdue(self) -> None:
        """Kills actors that hang, since nothing else frees them; Ray restarts them."""
        limit = self._settings.unit_timeout_s
        reason = f"it took longer than actors.unit_timeout_s, {limit:g} s"
        overdue = {one.actor for one in self._ledger.overdue(time.monotonic())}
        for actor in overdue:
            ray.kill(self.handles[actor], no_restart=False)
        for call in self._calls.take_of(overdue):  # with the units that were not overdue
            self._lose(call.assignment, reason)

    def _lose(self, assignment: Assignment, reason: str) -> None:
        self._upkeep.lost(assignment.actor, reason)
        try:
            self._ledger.lose(assignment, time.monotonic())
        except UnitLost as lost:
            raise UnitLost(
                f"{lost} on {self.role} actors, the last time because {reason}: see Ray's logs "
                "for why they die"
            ) from None

    def _retry(self, assignment: Assignment, error: RemoteError) -> None:
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


def _named(
    method: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name, for RLlib's manager sends only those."""
    _, *names = inspect.signature(method).parameters  # without self
    return {**dict(zip(names, args, strict=False)), **kwargs}
