"""A task of plain functions of the user's own: one that compares, others that read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lmcot.data.tasks.task import Scores, Task
from lmcot.data.tasks.users_own import load_own
from lmcot.data.values import BadRecord
from lmcot.errors import UserError
from lmcot.records import Example, Missing
from lmcot.text.reading import Reading


class FunctionTask(Task):
    """Extractive question answering with some of its functions replaced.

    EM is whether a comparison gives 1 (or True), and F1 is its value.
    """

    def __init__(
        self, name: str, compare: Callable[..., Any], read: str | None, fields: str | None
    ) -> None:
        """Args: name, compare: the comparing function and its name; read, fields: others' names.

        Raises:
            UserError: if a function cannot be loaded.
        """
        self.note = (
            f"Answers are compared by {name}: F1 is its value, EM and inclusion whether that is 1."
        )
        self._name, self._compare = name, compare
        self._read_name, self._fields_name = read or "", fields or ""
        self._read = load_own("task.read", read, "function") if read else None
        self._fields = load_own("task.fields", fields, "function") if fields else None

    def fields(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record as the user's function rewrites it; a ValueError makes it a bad record."""
        if self._fields is None:
            return record
        try:
            found = self._fields(record)
        except BadRecord:
            raise
        except ValueError as error:
            raise BadRecord(str(error)) from error
        except Exception as error:
            raise _raised(self._fields_name, error) from error
        if not isinstance(found, Mapping):
            raise UserError(f"the task's function '{self._fields_name}' returned {found!r:.60}, "
                            "not a record: return a dictionary")  # fmt: skip
        return found

    def read(self, text: str, question: str, *, cut: bool = False) -> Reading:
        """The answer that the user's function finds in a text, else what the text states."""
        base = super().read(text, question, cut=cut)
        if self._read is None:
            return base
        try:
            answer = self._read(text, question)
        except Exception as error:
            raise _raised(self._read_name, error) from error
        if not isinstance(answer, str):
            raise UserError(f"the task's function '{self._read_name}' returned {answer!r:.60}, not "
                            "a text: return the answer, or an empty text")  # fmt: skip
        missing: Missing = "" if answer.strip() else "cut" if cut else "empty"
        return Reading(answer.strip(), missing, base.stated or bool(answer.strip()))

    def scores(self, answer: str, example: Example) -> Scores:
        """What the user's function says of an answer; an empty one is wrong."""
        if not answer.strip():
            return Scores.right(False)
        try:
            value = float(self._compare(answer, example.answers))
        except Exception as error:
            raise _raised(self._name, error) from error
        right = float(value == 1.0)
        return Scores(right, value, right)

    def contains(self, rationale: str, example: Example) -> bool:
        """Whether what the rationale comes to is right."""
        return self.scores(self.read(rationale, example.question).answer, example).em == 1.0


def _raised(name: str, error: Exception) -> UserError:
    return UserError(f"the task's function '{name}' raised {type(error).__name__}: {error}: fix it")
