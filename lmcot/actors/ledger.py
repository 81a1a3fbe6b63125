"""The work ledger: which unit waits, which is with an actor, and which is done.

Pure bookkeeping, told the time and what happened; `Fleet` does what follows from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")

_NEVER_BEGUN_S = 0.5
"""A unit that is lost this soon met an actor that was dead already."""


class UnitLost(RuntimeError):
    """A unit was tried as often as the settings admit."""


@dataclass(slots=True)
class Entry(Generic[Key]):
    """One unit of work."""

    key: Key
    unit: Any
    attempts: int = 0
    """Attempts that came to nothing."""
    misses: int = 0
    """How often it was given to an actor that was dead already."""


@dataclass(slots=True, eq=False)
class Assignment(Generic[Key]):
    """A unit in the hands of an actor."""

    entry: Entry[Key]
    actor: int
    since: float
    deadline: float
    wanted: bool = True
    """Whether its result is still asked for."""


class Ledger(Generic[Key]):
    """Gives each unit to one actor at a time, and counts its result once.

    Units are given out in the order in which they were added; one that was lost comes first, and
    those that have time come when no other waits.
    """

    def __init__(self, max_attempts: int, timeout_s: float, *, actors: int) -> None:
        self._max_attempts = max_attempts
        self._timeout_s = timeout_s
        self._actors = actors
        self._waiting: deque[Entry[Key]] = deque()
        self._have_time: deque[Entry[Key]] = deque()
        self._underway: dict[int, Assignment[Key]] = {}
        self._open: set[Key] = set()
        self.lost = 0
        """Attempts that came to nothing so far."""

    @property
    def waiting(self) -> int:
        """Units that no actor has yet."""
        return len(self._waiting) + len(self._have_time)

    @property
    def open(self) -> list[Key]:
        """Units that are not done: with an actor first, then those that wait."""
        underway = [a.entry.key for a in self._underway.values() if a.wanted]
        return underway + [entry.key for entry in (*self._waiting, *self._have_time)]

    def add(self, key: Key, unit: Any, *, has_time: bool = False) -> None:
        """Takes a unit on.

        Args:
            has_time: whether it comes after all that have none, also those that are added later.

        Raises:
            ValueError: if one of that key is not done yet.
        """
        if key in self._open:
            raise ValueError(f"unit {key} is in the ledger already")
        self._open.add(key)
        (self._have_time if has_time else self._waiting).append(Entry(key, unit))

    def idle(self, actors: Sequence[int]) -> list[int]:
        """Those of some actors that have no unit."""
        return [actor for actor in actors if actor not in self._underway]

    def assign(self, actor: int, now: float) -> Assignment[Key] | None:
        """Gives an actor the next unit; None if it has one, or none waits."""
        if actor in self._underway or not self.waiting:
            return None
        entry = (self._waiting or self._have_time).popleft()
        given = Assignment(entry, actor, now, now + self._timeout_s)
        self._underway[actor] = given
        return given

    def settle(self, assignment: Assignment[Key]) -> bool:
        """A result came; whether it counts: it is asked for, and the first of its unit."""
        if not self._release(assignment) or not assignment.wanted:
            return False
        self._open.remove(assignment.entry.key)
        return True

    def lose(self, assignment: Assignment[Key], now: float) -> None:
        """An attempt came to nothing: the unit is given out again, before the others.

        It counts as an attempt unless the actor was dead before it could begin, as those of a
        node that went down all are.

        Raises:
            UnitLost: if that was its last attempt.
        """
        if not self._release(assignment) or not assignment.wanted:
            return
        self.lost += 1
        entry = assignment.entry
        if now - assignment.since < _NEVER_BEGUN_S and entry.misses < self._actors:
            entry.misses += 1
        else:
            entry.attempts += 1
        if entry.attempts >= self._max_attempts:
            raise UnitLost(f"unit {entry.key} was lost {entry.attempts} times")
        self._waiting.appendleft(entry)

    def overdue(self, now: float) -> list[Assignment[Key]]:
        """Units whose actors have had their time."""
        return [a for a in self._underway.values() if now > a.deadline]

    def abandon(self) -> None:
        """Forgets all units; the actors that are at one stay busy until it ends."""
        self._waiting.clear()
        self._have_time.clear()
        self._open.clear()
        for assignment in self._underway.values():
            assignment.wanted = False

    def _release(self, assignment: Assignment[Key]) -> bool:
        """Frees the actor; False if the unit was taken from it before."""
        if self._underway.get(assignment.actor) is not assignment:
            return False
        del self._underway[assignment.actor]
        return True
