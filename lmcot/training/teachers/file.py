"""The teacher ``file``: rationales that the user brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lmcot.config import FileTeacher
from lmcot.data.rationale_file import BroughtRationale
from lmcot.records import Annotation, Example, Prompt
from lmcot.training.filters import Filters, is_right
from lmcot.training.reasons import RIGHT

NONE: Final = "the file has no rationale for the question"


def taken(
    example: Example,
    brought: Sequence[BroughtRationale],
    teacher: FileTeacher,
    filters: Filters,
    prompt: Prompt,
) -> list[Annotation]:
    """The rationales of a question, kept or rejected; a question without any has a line, too."""
    if not brought:
        return [Annotation(example.id, teacher.kind, "", "", False, NONE)]
    found: list[Annotation] = []
    task = filters.task
    for sample, one in enumerate(brought):
        if one.answer is None:
            answer = task.stated(one.rationale, example.question)
        else:
            answer = one.answer.strip()
        if not answer:
            fault = "it comes to no answer: give its 'answer', or end it in one"
        elif not is_right(answer, example, teacher.right_by, teacher.min_f1, task):
            fault = "its answer is wrong"
        else:
            fault = filters.reason(example, one.rationale, prompt=prompt)
        found.append(
            Annotation(
                example.id, teacher.kind, one.rationale, answer, not fault, fault or RIGHT,
                sample=sample,
            )
        )  # fmt: skip
    return found
