"""A fleet of actors of one role, and the work that goes through it.

RLlib's `FaultTolerantActorManager` keeps the actors: calls, health probes, restarts. It never
marks a slow actor unhealthy and drops requests above its bound, so the fleet sends one unit at a
time to each actor, watches the deadline itself, and asks a lost unit again elsewhere.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from lmcot.actors.base import ActorBase, RemoteError
from lmcot.config import ActorsSettings, RoleSettings
from lmcot.monitor.progress import say

_SHORTEST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.25
_PROBE_EVERY_S = 2.0
_PROBE_TIMEOUT_S = 1.0


class _Pauses:
    """Pauses between looks for results: short at first, then longer and longer.

    A driver that looks all the time takes CPU from the actors that compute on the same machine.
    """

    def __init__(self) -> None:
        self._pause = _SHORTEST_PAUSE_S

    def reset(self) -> None:
        """Something came: the next may follow at once."""
        self._pause = _SHORTEST_PAUSE_S

    def sleep(self) -> None:
        """Sleeps, and will sleep longer the next time."""
        time.sleep(self._pause)
        self._pause = min(self._pause * 1.3, _LONGEST_PAUSE_S)


@dataclass(slots=True)
class _Underway:
    """A unit that an actor is working on."""

    index: int
    actor_id: int
    deadline: float


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
        self._on_restore: list[tuple[str, dict[str, Any]]] = []
        remote = ray.remote(actor_class).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_restarts=-1,
            max_concurrency=calls_at_once,
        )
        self.handles = [remote.remote(**arguments) for _ in range(resources.count)]
        self._manager = FaultTolerantActorManager(
            self.handles, max_remote_requests_in_flight_per_actor=1
        )
        self._last_probe = 0.0

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all actors."""
        self._manager.clear()

    @property
    def restarts(self) -> int:
        """How many actors came back after a failure."""
        return int(self._manager.total_num_restarts())

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
        """Calls a method on every actor and returns the results in the order of the actors.

        Args:
            restored: whether an actor that was restarted gets this call again (the latest one of
                each method), before it gets work.

        Raises:
            TimeoutError, RuntimeError: naming the role and the method.
        """
        limit = timeout_s or self._settings.unit_timeout_s
        if restored:
            self._on_restore = [c for c in self._on_restore if c[0] != method]
            self._on_restore.append((method, kwargs))
        sent = self._manager.foreach_actor_async(method, tag=method, kwargs=kwargs)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + limit
        pauses = _Pauses()
        while len(results) < sent:
            self._check()
            for result in self._manager.fetch_ready_async_reqs(tags=method):
                if not result.ok:
                    raise RuntimeError(
                        f"a {self.role} actor was lost during '{method}': {result.get()}"
                    )
                results[result.actor_id] = self._unwrap(result.get())
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {limit:.0f} s for '{method}' on {sent - len(results)} of "
                    f"{self._manager.num_actors()} {self.role} actor(s): check that the cluster "
                    "has the resources that 'actors' asks for, or raise the time limit there"
                )
            pauses.sleep()
        return [results[actor_id] for actor_id in sorted(results)]

    def map(
        self,
        method: str,
        units: Sequence[Any],
        *,
        on_result: Callable[[int, Any], None] = lambda index, result: None,
    ) -> list[Any]:
        """Does every unit once, on whichever actor is free; results in the order of the units.

        A unit whose actor died or overran its time limit is done again, up to
        ``actors.max_attempts`` times.

        Args:
            on_result: told each unit's index and result as they come.

        Raises:
            RuntimeError: if a unit cannot be done, or an actor's code failed.
        """
        results: dict[int, Any] = {}
        attempts = [0] * len(units)
        waiting = deque(range(len(units)))
        underway: dict[str, _Underway] = {}
        pauses = _Pauses()
        while len(results) < len(units):
            self._check()
            self._restore()
            self._send(method, units, waiting, underway)
            for tag, result in self._finished(underway):
                pauses.reset()
                unit = underway.pop(tag)
                if result is not None:
                    value = self._unwrap(result.get())
                    results[unit.index] = value
                    on_result(unit.index, value)
                    continue
                attempts[unit.index] += 1
                if attempts[unit.index] >= self._settings.max_attempts:
                    raise RuntimeError(
                        f"unit {unit.index} of '{method}' was lost {attempts[unit.index]} times "
                        f"on {self.role} actors: see Ray's logs for why they die"
                    )
                waiting.append(unit.index)
            pauses.sleep()
        return [results[index] for index in range(len(units))]

    def _send(
        self,
        method: str,
        units: Sequence[Any],
        waiting: deque[int],
        underway: dict[str, _Underway],
    ) -> None:
        """Gives each free healthy actor one unit."""
        busy = {unit.actor_id for unit in underway.values()}
        for actor_id in self._manager.healthy_actor_ids():
            if not waiting or actor_id in busy:
                continue
            index = waiting.popleft()
            tag = f"{method}/{index}"
            self._manager.foreach_actor_async(
                method, tag=tag, kwargs={"unit": units[index]}, remote_actor_ids=[actor_id]
            )
            deadline = time.monotonic() + self._settings.unit_timeout_s
            underway[tag] = _Underway(index, actor_id, deadline)

    def _finished(self, underway: dict[str, _Underway]) -> list[tuple[str, Any]]:
        """Units that ended: with their result, or None for those that were lost."""
        if not underway:
            return []
        finished = [
            (str(result.tag), result if result.ok else None)
            for result in self._manager.fetch_ready_async_reqs(tags=list(underway))
        ]
        told = {tag for tag, _ in finished}
        now = time.monotonic()
        for tag, unit in underway.items():
            if tag not in told and now > unit.deadline:
                # Only its end frees an actor that hangs; Ray starts it anew.
                ray.kill(self.handles[unit.actor_id], no_restart=False)
                self._manager.set_actor_state(unit.actor_id, healthy=False)
                finished.append((tag, None))
        return finished

    def _restore(self) -> None:
        """Takes actors that Ray started anew back into service, set up as the others are."""
        if self._manager.num_healthy_actors() == self._manager.num_actors():
            return
        if time.monotonic() - self._last_probe < _PROBE_EVERY_S:
            return
        restored = self._manager.probe_unhealthy_actors(
            timeout_seconds=_PROBE_TIMEOUT_S, mark_healthy=True
        )
        self._last_probe = time.monotonic()
        for actor_id in restored:
            for method, kwargs in self._on_restore:
                results = self._manager.foreach_actor(
                    method,
                    kwargs=kwargs,
                    remote_actor_ids=[actor_id],
                    timeout_seconds=self._settings.start_timeout_s,
                )
                done = [self._unwrap(result.get()) for result in results.ignore_errors()]
                if not done:  # lost again, or too slow: no work before it is set up
                    self._manager.set_actor_state(actor_id, healthy=False)
                    break

    def _unwrap(self, value: Any) -> Any:
        if isinstance(value, RemoteError):
            raise value.to_exception(f"{self.role} actor")
        return value
