"""Which questions rest: those that were solved, or never solved, in their last tries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from lmcot.config import CurriculumSettings
from lmcot.records import GroupResult

SOLVED: Final = "s"
UNSOLVED: Final = "u"
MIXED: Final = "m"


class Turn(NamedTuple):
    """A question whose turn has come."""

    row: int
    """Its place among the training questions."""
    epoch: int


class Curriculum:
    """The last tries of each question, and until when it rests."""

    def __init__(self, settings: CurriculumSettings, state: Mapping[str, Any]) -> None:
        """Resumes from a state of `state`; an empty one if nothing was tried."""
        self._settings = settings
        self._tries: dict[int, str] = {int(row): t for row, t in state.get("tries", {}).items()}
        self._rests: dict[int, int] = {int(row): e for row, e in state.get("rests", {}).items()}
        """The last epoch of each rest, by the question's row."""

    def state(self) -> dict[str, Any]:
        """What a resume needs, as plain JSON types."""
        return {
            "tries": {str(row): tries for row, tries in self._tries.items()},
            "rests": {str(row): epoch for row, epoch in self._rests.items()},
        }

    def rests(self, turn: Turn) -> bool:
        """Whether a question's turn passes because it rests."""
        return turn.epoch <= self._rests.get(turn.row, -1)

    def resting(self, epoch: int) -> list[int]:
        """Rows of the questions that rest in an epoch; those whose rest ends first come first."""
        rows = [row for row, last in self._rests.items() if epoch <= last]
        return sorted(rows, key=lambda row: (self._rests[row], row))

    def wake(self, row: int) -> None:
        """Ends a question's rest."""
        del self._rests[row]

    def note(self, turn: Turn, result: GroupResult) -> None:
        """Notes a try; one of which nothing could be judged is none."""
        if not result.judged:
            return
        known = self._tries.get(turn.row, "") + _outcome(result)
        settings = self._settings
        self._tries[turn.row] = known[-max(settings.solved or 0, settings.unsolved or 0) :]
        if self.has_come_to_rest(turn.row, SOLVED) or self.has_come_to_rest(turn.row, UNSOLVED):
            self._rests[turn.row] = turn.epoch + settings.rest
        else:
            self._rests.pop(turn.row, None)

    def has_come_to_rest(self, row: int, outcome: str) -> bool:
        """Whether a question's last tries all had an outcome for which it rests."""
        settings = self._settings
        needed = settings.solved if outcome == SOLVED else settings.unsolved
        return needed is not None and self._tries[row].endswith(outcome * needed)


def _outcome(result: GroupResult) -> str:
    if result.right == result.judged:
        return SOLVED
    return MIXED if result.right else UNSOLVED
