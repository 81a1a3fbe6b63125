"""The teacher ``file``: rationales that the user brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lmcot.config import FileTeacher
from lmcot.data.rationale_file import BroughtRationale
from lmcot.records import Annotation, Example, Prompt
from lmcot.text.answers import concluded_answer
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
    for sample, one in enumerate(brought):
        answer = concluded_answer(one.rationale) if one.answer is None else one.answer.strip()
        if not answer:
            fault = "it comes to no answer: give its 'answer', or end it in one"
        elif not is_right(answer, example.answers, teacher.right_by, teacher.min_f1):
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
