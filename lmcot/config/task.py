"""Settings of the task: what a question is, and how its answer is read and compared."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator

from lmcot.config.base import Fraction, NonNegativeFloat, Settings
from lmcot.errors import UserError

_MODULE_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class TaskSettings(Settings):
    """What all tasks have."""

    needs_context: ClassVar[bool] = False
    """Whether a question without passages is refused where ``data.require_context`` is unset."""

    @property
    def functions(self) -> tuple[str, ...]:
        """The user's own code that it runs, as ``module:name``."""
        return ()


class ExtractiveQa(TaskSettings):
    """Short answers in words, most of which stand in the passages: HotpotQA, SQuAD, MuSiQue."""

    needs_context: ClassVar[bool] = True
    kind: Literal["extractive_qa"] = "extractive_qa"


class Boolean(TaskSettings):
    """Questions that are answered by yes or no: StrategyQA, BoolQ."""

    kind: Literal["boolean"]


class MultipleChoice(TaskSettings):
    """Questions with options, one of which is right: ARC, CommonsenseQA, OpenBookQA, MMLU."""

    kind: Literal["multiple_choice"]
    answers: Literal["labels", "texts"] = "labels"
    """Whether the models answer with the letter of an option, or with its text. Replies are read in
    either form."""


class Numeric(TaskSettings):
    """Questions that are answered by a number: GSM8K."""

    kind: Literal["numeric"]
    tolerance: NonNegativeFloat = 0.0
    """Largest difference between an answer and a right one."""
    relative_tolerance: NonNegativeFloat = 0.0
    """Largest difference as a share of the right answer; the larger tolerance counts."""


class FreeText(TaskSettings):
    """Answers in sentences, compared by a metric, or by a function of the user's own."""

    kind: Literal["free_text"]
    metric: str = "rouge_l"
    """``rouge_l`` (F-measure of the longest common subsequence of words), ``f1`` (of the words), or
    ``module:function``: ``def score(answer: str, right_answers: tuple[str, ...]) -> float`` with
    values from 0 to 1. The module must be importable where the actors run."""
    right_from: Fraction = 0.5
    """The score from which an answer counts as right."""

    @field_validator("metric")
    @classmethod
    def _is_known(cls, metric: str) -> str:
        if metric not in ("rouge_l", "f1") and not _MODULE_NAME.fullmatch(metric):
            raise ValueError(
                f"'{metric}' is no metric: use 'rouge_l', 'f1' or a function as module:function"
            )
        return metric

    @property
    def functions(self) -> tuple[str, ...]:
        """The function that compares answers, where it is the user's own."""
        return (self.metric,) if ":" in self.metric else ()


class CustomTask(TaskSettings):
    """A task of the user's own: plain functions, or a class that derives from
    ``lmcot.data.tasks.Task``."""

    kind: Literal["custom"]
    name: str
    """The class, as ``module:Class``; or ``module:function``, which compares an answer with the
    right ones: ``def score(answer: str, right_answers: tuple[str, ...]) -> bool | float``, 1 for a
    right answer. The module must be importable where the actors run."""
    read: str | None = None
    """With a function as ``name``: another one that reads the answer out of a text,
    ``def read(text: str, question: str) -> str``; unset: what the text states."""
    fields: str | None = None
    """With a function as ``name``: another one that puts a record into the fields of docs/data.md,
    ``def fields(record: dict) -> dict``; a ValueError makes it a bad record."""

    @field_validator("name", "read", "fields")
    @classmethod
    def _is_named_in_full(cls, name: str | None) -> str | None:
        if name is not None and not _MODULE_NAME.fullmatch(name):
            raise ValueError(f"'{name}' is not of the form module:Class or module:function")
        return name

    @property
    def functions(self) -> tuple[str, ...]:
        """The class, or the functions."""
        return tuple(one for one in (self.name, self.read, self.fields) if one is not None)


def _by_name(task: object) -> object:
    return {"kind": task} if isinstance(task, str) else task


TaskChoice = Annotated[
    Annotated[
        ExtractiveQa | Boolean | MultipleChoice | Numeric | FreeText | CustomTask,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_by_name),
]
"""A task's section, or its name alone."""


def task_named(name: str) -> TaskSettings:
    """The settings of a task that its name alone describes.

    Raises:
        UserError: if there is no such task.
    """
    try:
        found: TaskSettings = TypeAdapter(TaskChoice).validate_python(name)
    except ValidationError:
        raise UserError(
            f"there is no task '{name}' that a name alone describes: choose extractive_qa, "
            "boolean, multiple_choice, numeric or free_text, or set 'task' in a settings file"
        ) from None
    return found


TEMPLATES: Final = {one: one for one in ("boolean", "multiple_choice", "numeric", "free_text")}
"""The templates that come with lmcot for a task, used where ``prompts.templates`` is not set; the
other tasks have the default ones."""
