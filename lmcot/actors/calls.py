"""The calls of a fleet that are in flight, and how long its actors had any."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from lmcot.actors.kept import Kept
from lmcot.actors.ledger import Assignment


@dataclass(frozen=True, slots=True)
class Order:
    """A unit, what is to be done with it, and who is told the result."""

    method: str
    unit: Any
    then: Callable[..., None]
    kept: int = 0
    """Number of values that stay in the object store, each passed to ``then`` as a `Kept`."""


@dataclass(frozen=True, slots=True)
class Call:
    """A unit that an actor has; its reference becomes ready with the result."""

    ref: Any
    assignment: Assignment
    order: Order
    kept: tuple[Kept[Any], ...]


class Calls:
    """The calls in flight, by reference."""

    def __init__(self) -> None:
        self._calls: dict[Any, Call] = {}
        self._of_actor: Counter[int] = Counter()
        self._busy_since: dict[int, float] = {}
        """When each actor that has calls got the first of them."""
        self._busy_s = 0.0
        self._asked = time.monotonic()

    def refs(self) -> list[Any]:
        """The references, which become ready."""
        return list(self._calls)

    def send(self, handle: Any, given: Assignment) -> None:
        """Calls an actor with the unit that it was assigned."""
        order: Order = given.entry.unit
        if not order.kept:
            ref, kept = handle.apply.remote(order.method, unit=order.unit), []
        else:
            split = handle.apply_split.options(num_returns=1 + order.kept)
            ref, *kept = split.remote(order.kept, order.method, unit=order.unit)
        self._calls[ref] = Call(ref, given, order, tuple(map(Kept, kept)))
        self._of_actor[given.actor] += 1
        self._busy_since.setdefault(given.actor, given.since)

    def take_ready(self) -> Iterator[Call]:
        """Takes the calls whose result or failure has arrived."""
        if self._calls:
            ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
            yield from map(self._take, ready)

    def take_of(self, actors: Collection[int]) -> Iterator[Call]:
        """Takes all calls of some actors."""
        for ref, call in list(self._calls.items()):
            if call.assignment.actor in actors:
                yield self._take(ref)

    def _take(self, ref: Any) -> Call:
        call = self._calls.pop(ref)
        actor = call.assignment.actor
        self._of_actor[actor] -= 1
        if not self._of_actor[actor]:
            self._busy_s += self._seconds(self._busy_since.pop(actor), time.monotonic())
        return call

    def idle_share(self, actors: int) -> float:
        """Share of the actors' time, since this was last asked, in which they had no call."""
        now = time.monotonic()
        busy = self._busy_s + sum(self._seconds(since, now) for since in self._busy_since.values())
        available = (now - self._asked) * actors
        self._busy_s, self._asked = 0.0, now
        return max(0.0, 1 - busy / available) if available else 0.0

    def _seconds(self, since: float, now: float) -> float:
        return now - max(since, self._asked)
