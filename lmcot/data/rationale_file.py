"""Rationales that a user brings in a file, for the teacher ``file``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmcot.data.files import opened, question_files
from lmcot.errors import UserError


@dataclass(frozen=True, slots=True)
class BroughtRationale:
    """A rationale of a file."""

    example_id: str
    rationale: str
    answer: str | None
    """The answer that it comes to; None: the file does not say."""


def read_rationales(path: str) -> list[BroughtRationale]:
    """The rationales of JSON lines, packed or not.

    Raises:
        UserError: if there is no such file, or naming the first line that holds no rationale.
    """
    found = [one for file in question_files(path) for one in _read(path, file)]
    if not found:
        raise UserError(f"the file '{path}' (teacher.path) holds no rationale: check it")
    return found


def _read(path: str, file: Path) -> Iterator[BroughtRationale]:
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _rationale(json.loads(line))
                except ValueError as error:
                    raise UserError(
                        f"line {number} of '{path}' (teacher.path) holds no rationale ({error}): "
                        "each line must be a JSON object with 'id', 'rationale' and, if it is "
                        "known, 'answer'"
                    ) from None


def _rationale(record: object) -> BroughtRationale:
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    id_, rationale, answer = (record.get(key) for key in ("id", "rationale", "answer"))
    if not isinstance(id_, str | int) or isinstance(id_, bool) or not str(id_):
        raise ValueError("its 'id' is missing or no text")
    if not isinstance(rationale, str):
        raise ValueError("its 'rationale' is missing or no text")
    if answer is not None and not isinstance(answer, str):
        raise ValueError("its 'answer' is no text")
    return BroughtRationale(str(id_), rationale.strip(), answer)
