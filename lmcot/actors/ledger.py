"""The work ledger: which units wait, and which actor works on which unit.

It only keeps the books: `Fleet` tells it the time and what happened, and acts on what it answers.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NEVER_BEGUN_S = 0.5
"""A unit that is lost this soon met an actor that was dead already."""


class UnitLost(RuntimeError):
    """A unit was lost as often as the settings allow."""


@dataclass(slots=True)
class Entry:
    """One unit of work."""

    key: str
    unit: Any
    attempts: int = 0
    """Attempts that failed."""
    misses: int = 0
    """How often it was given to an actor that was dead already."""


@dataclass(slots=True, eq=False)
class Assignment:
    """A unit that an actor works on."""

    entry: Entry
    actor: int
    since: float
    deadline: float
    wanted: bool = True
    """Whether its result is still needed."""


class Ledger:
    """Gives each unit to one actor at a time, and counts its result once.

    An actor has at most ``at_once`` units. Units are given out in the order in which they were
    added. A unit that was lost comes first; units of low priority come when no other waits.
    """

    def __init__(
        self, max_attempts: int, timeout_s: float, *, actors: int, at_once: int = 1
    ) -> None:
        self._max_attempts = max_attempts
        self._timeout_s = timeout_s
        self._actors = actors
        self._at_once = at_once
        self._waiting: deque[Entry] = deque()
        self._low_priority: deque[Entry] = deque()
        self._underway: defaultdict[int, list[Assignment]] = defaultdict(list)
        """What each actor works on."""
        self._room = [(0, actor) for actor in range(actors)]
        """A heap of (number of units, actor): the present number of each actor that has room, and
        earlier numbers, which are passed over."""
        self._in_room = set(self._room)
        self._open: set[str] = set()
        self.lost = 0
        """Number of attempts that failed."""

    @property
    def waiting(self) -> int:
        """Units that no actor has yet."""
        return len(self._waiting) + len(self._low_priority)

    def add(self, key: str, unit: Any, *, low_priority: bool = False) -> None:
        """Queues a unit.

        Args:
            low_priority: give it out only when no other unit waits, even one that is added later.

        Raises:
            ValueError: if there is an unfinished unit with this key.
        """
        if key in self._open:
            raise ValueError(f"unit {key} is in the ledger already")
        self._open.add(key)
        (self._low_priority if low_priority else self._waiting).append(Entry(key, unit))

    def idle(self, actors: Sequence[int]) -> list[int]:
        """Those of the given actors that have no unit."""
        return [actor for actor in actors if not self.units_of(actor)]

    def freest(self, usable: Callable[[int], bool]) -> int | None:
        """The usable actor with the fewest units, the first of several; None if none has room.

        Takes time in proportion to the logarithm of the number of actors, as long as few are not
        usable.
        """
        aside: list[tuple[int, int]] = []
        found = None
        while self._room and found is None:
            units, actor = self._room[0]
            if units == len(self._underway[actor]) and usable(actor):
                found = actor
            else:
                heapq.heappop(self._room)
                self._in_room.remove((units, actor))
                if units == len(self._underway[actor]):
                    aside.append((units, actor))
        for _, actor in aside:
            self._list(actor)
        return found

    def units_of(self, actor: int) -> list[Assignment]:
        """What an actor works on."""
        return list(self._underway[actor])

    def assign(self, actor: int, now: float) -> Assignment | None:
        """Gives an actor the next unit; None if it has no room, or none waits."""
        if not self.waiting or not self._has_room(actor):
            return None
        entry = (self._waiting or self._low_priority).popleft()
        given = Assignment(entry, actor, now, now + self._timeout_s)
        self._underway[actor].append(given)
        self._list(actor)
        return given

    def settle(self, assignment: Assignment) -> bool:
        """Notes a result, and returns whether it counts: the first of a unit that is wanted."""
        if not self._release(assignment) or not assignment.wanted:
            return False
        self._open.remove(assignment.entry.key)
        return True

    def lose(self, assignment: Assignment, now: float) -> None:
        """Notes a failed attempt: the unit is given out again, before the others.

        It counts as an attempt unless the actor was dead before it began, like all actors of a
        node that went down.

        Raises:
            UnitLost: if that was the unit's last attempt.
        """
        if not self._release(assignment) or not assignment.wanted:
            return
        self.lost += 1
        entry = assignment.entry
        if now - assignment.since < NEVER_BEGUN_S and entry.misses < self._actors:
            entry.misses += 1
        else:
            entry.attempts += 1
        if entry.attempts >= self._max_attempts:
            raise UnitLost(f"unit {entry.key} was lost {entry.attempts} times")
        self._waiting.appendleft(entry)

    def overdue(self, now: float) -> list[Assignment]:
        """Units whose time limit has passed."""
        return [one for given in self._underway.values() for one in given if now > one.deadline]

    def abandon(self) -> None:
        """Forgets all units; an actor that works on one stays busy until it ends."""
        self._waiting.clear()
        self._low_priority.clear()
        self._open.clear()
        for given in self._underway.values():
            for assignment in given:
                assignment.wanted = False

    def _has_room(self, actor: int) -> bool:
        return len(self._underway[actor]) < self._at_once

    def _list(self, actor: int) -> None:
        """Lists an actor by its present number of units, if it has room."""
        entry = len(self._underway[actor]), actor
        if self._has_room(actor) and entry not in self._in_room:
            heapq.heappush(self._room, entry)
            self._in_room.add(entry)

    def _release(self, assignment: Assignment) -> bool:
        """Takes a unit from its actor; False if it had been taken from it before."""
        given = self._underway[assignment.actor]
        if assignment not in given:
            return False
        given.remove(assignment)
        self._list(assignment.actor)
        return True
