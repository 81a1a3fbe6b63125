"""Settings of the teachers, whose rationales the small LM learns."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from lmcot.config.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Settings
from lmcot.records import Example

_FIELD: Final = re.compile(r"\{(\w*)\}")


class FilterSettings(Settings):
    """What a rationale must not be, to be kept. Its length is always checked."""

    min_words: NonNegativeInt = 3
    """Least words, beside the conclusion and those of the answer: with fewer a rationale is merely
    the answer."""
    repeats_question: bool = True
    """Reject rationales that, without their conclusion, have only words of the question."""
    prompt_words: NonNegativeInt = 6
    """Reject rationales that copy so many words in a row from the instructions or the
    demonstrations of the prompt, or one of its labels. 0: not checked."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    """Reject rationales whose three-word sequences overlap so much (Jaccard) with those of a
    rationale that was kept before, of the same question or another one. Unset: not checked."""


class _Teacher(Settings):
    """What all teachers have."""

    filters: FilterSettings = FilterSettings()
    """What a rationale must not be, to be kept."""


class RightAnswer(Settings):
    """When the answer that a rationale comes to is right, so that the rationale may be kept."""

    right_by: Literal["em", "f1", "inclusion"] = "f1"
    """When an answer is right: it is a right answer (``em``), its F1 with one reaches ``min_f1``,
    or it contains one (``inclusion``)."""
    min_f1: Fraction = 1.0
    """Least F1 of a right answer; 1.0 asks for exact match of the normalised words."""


class _JudgedTeacher(_Teacher, RightAnswer):
    """A teacher whose answers may be wrong, and that may give several rationales a question."""

    best_by: Literal["factuality", "shortest", "first"] = "factuality"
    """Which one is kept of several good rationales of a question. ``factuality``: the one that
    its passages support most (the one metric that agrees with people), of equals the shortest."""


def _fill(text: str, **fields: str) -> str:
    # One pass: braces in what is filled in stay what they are.
    return _FIELD.sub(lambda match: fields[match[1]], text)


def _check_fields(text: str, required: str, allowed: set[str]) -> str:
    fields = set(_FIELD.findall(text))
    if required not in fields:
        raise ValueError(f"it lacks the field {{{required}}}: add it")
    if unknown := fields - allowed:
        known = " and ".join(f"{{{name}}}" for name in sorted(allowed, reverse=True))
        raise ValueError(f"it has the field {{{min(unknown)}}}, but it may hold {known}")
    return text


class SupportingFactsTeacher(_Teacher):
    """Rationales made of the data set's own supporting facts, and the answer."""

    kind: Literal["supporting_facts"]
    filters: FilterSettings = FilterSettings(repeats_question=False, near_duplicates=None)
    """What a rationale must not be, to be kept. Questions may quote their facts, and share them."""
    template: str = "{facts} So the answer is {answer}."
    """Text of a rationale. ``{facts}`` are the sentences in the order of the context; ``{answer}``
    may be left out."""
    titles: bool = False
    """Whether the title of a paragraph stands before its first sentence where that names no word of
    it, as in ``Title: He was born in 1950.``"""
    shorten: bool = True
    """Whether a rationale that is longer than ``policy.max_new_tokens`` loses the sentences that
    the answer does not need, until it fits; if not, it is rejected."""

    @field_validator("template")
    @classmethod
    def _has_the_facts(cls, template: str) -> str:
        return _check_fields(template, "facts", {"facts", "answer"})

    def rationale(self, facts: str, answer: str) -> str:
        """The text of a rationale."""
        return _fill(self.template, facts=facts, answer=answer)


class FrozenTeacher(_JudgedTeacher):
    """Rationales that the frozen LM wrote; kept only where its answer is right (the paper's)."""

    kind: Literal["frozen"]
    demonstrations: bool = True
    """Whether it is shown the demonstrations of ``prompts``."""
    samples: PositiveInt = 1
    """Rationales that it writes for each question."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0: greedy."""
    rationalise: bool = False
    """Whether questions without a good rationale are asked again with the right answer as a hint
    (STaR, Zelikman et al. 2022)."""
    hint: str = "(The right answer is {answer}.)"
    """Text of the hint, which follows the question."""

    @field_validator("hint")
    @classmethod
    def _has_the_answer(cls, hint: str) -> str:
        return _check_fields(hint, "answer", {"answer"})

    @model_validator(mode="after")
    def _samples_differ(self) -> FrozenTeacher:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples is {self.samples}, but at temperature 0 all samples are the same: set "
                "temperature to 0.7, for example, or samples to 1"
            )
        return self

    def with_hint(self, example: Example) -> Example:
        """The question with its answer as a hint."""
        return replace(
            example, question=f"{example.question} {_fill(self.hint, answer=example.answer)}"
        )


class FileTeacher(_JudgedTeacher):
    """Rationales that you bring in a file."""

    kind: Literal["file"]
    path: str
    """JSON lines, packed or not: ``id`` of a question of ``data.train``, ``rationale``, and the
    ``answer`` that it comes to (without: the answer that the rationale concludes with). A question
    may have several."""
    unknown_ids: Literal["refuse", "ignore"] = "refuse"
    """What happens if the file has ids of no training question."""


Teacher = Annotated[
    SupportingFactsTeacher | FrozenTeacher | FileTeacher, Field(discriminator="kind")
]
