"""The work ledger: which units wait, and which actor works on which unit.

It only keeps the books: `Fleet` tells it the time and what happened, and acts on what it answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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
        self._underway: list[Assignment] = []
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

    def freest(self, actors: Sequence[int]) -> int | None:
        """The given actor with the fewest units, the first of several; None if none has room."""
        actor = min(actors, key=lambda one: len(self.units_of(one)), default=None)
        return actor if actor is not None and self._has_room(actor) else None

    def units_of(self, actor: int) -> list[Assignment]:
        """What an actor works on."""
        return [one for one in self._underway if one.actor == actor]

    def assign(self, actor: int, now: float) -> Assignment | None:
        """Gives an actor the next unit; None if it has no room, or none waits."""
        if not self.waiting or not self._has_room(actor):
            return None
        entry = (self._waiting or self._low_priority).popleft()
        given = Assignment(entry, actor, now, now + self._timeout_s)
        self._underway.append(given)
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
        return [a for a in self._underway if now > a.deadline]

    def abandon(self) -> None:
        """Forgets all units; an actor that works on one stays busy until it ends."""
        self._waiting.clear()
        self._low_priority.clear()
        self._open.clear()
        for assignment in self._underway:
            assignment.wanted = False

    def _has_room(self, actor: int) -> bool:
        return len(self.units_of(actor)) < self._at_once

    def _release(self, assignment: Assignment) -> bool:
        """Takes a unit from its actor; False if it had been taken from it before."""
        if assignment not in self._underway:
            return False
        self._underway.remove(assignment)
        return True
