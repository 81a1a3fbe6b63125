"""The teacher ``supporting_facts``: rationales made of the data set's own annotation."""

from __future__ import annotations

from typing import Final

from lmcot.config import SupportingFactsTeacher
from lmcot.data.facts import facts_rationale
from lmcot.records import Annotation, Prompt
from lmcot.run.context import Question
from lmcot.training.filters import Filters

FACTS: Final = "supporting facts"
SHORTENED: Final = "supporting facts, shortened"


def taken(
    question: Question, teacher: SupportingFactsTeacher, filters: Filters, prompt: Prompt
) -> Annotation:
    """A question's supporting facts as a rationale, kept or rejected."""
    example = question.example
    made = facts_rationale(example, teacher, filters.fits)
    if not example.gold_sentences():
        fault = "the question has no supporting facts"
    elif question.facts_cut:
        fault = "a supporting fact is outside the context's token budget"
    else:
        fault = filters.reason(example, made.text, prompt=prompt)
    good = SHORTENED if made.left_out else FACTS
    good += "" if made.complete else " to the paragraph of the answer"
    return Annotation(
        example.id, teacher.kind, made.text, example.answer, not fault, fault or good,
        left_out=made.left_out,
    )  # fmt: skip
