"""Settings of distillation: batches, validation and the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from lmcot.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Settings
from lmcot.config.training import OptimiserSettings


class ValidationSettings(Settings):
    """Questions that are kept out of training. Their loss decides which policy is kept."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the questions with a rationale that is kept out."""
    questions: PositiveInt | None = None
    """Number of such questions, in place of ``share``."""
    every: PositiveInt = 50
    """Optimiser steps between two validations; one more follows the last step."""
    patience: PositiveInt | None = None
    """Training stops after this many validations in a row without a lower loss; unset: it does not
    stop early."""
    samples: NonNegativeInt = 4
    """Questions for which each validation shows the policy's rationale beside the teacher's. The
    first learner has a second copy of the small LM to write them, unless it is 0."""

    @model_validator(mode="after")
    def _one_size(self) -> ValidationSettings:
        if (self.share is None) == (self.questions is None):
            found = "neither is" if self.share is None else "both are"
            raise ValueError(
                "validation keeps out a 'share' of the questions or a number of 'questions', and "
                f"{found} set: set one of them, or leave validation out"
            )
        return self


class AnswerTask(Settings):
    """A second task: to answer the question at once (Hsieh et al. 2023, Distilling step-by-step).

    Its prompt is that of the row ``standard`` without demonstrations.
    """

    weight: PositiveFloat = 1.0
    """Weight of the answers' loss beside the rationales'."""
    prefix: str = ""
    """Text before the question in this task, such as ``[answer] ``."""


class DistillSettings(Settings):
    """Supervised training of the small LM on the teacher's rationales."""

    epochs: PositiveInt = 1
    """Passes over the kept rationales."""
    batch_size: PositiveInt | None = 8
    """Rationales in one optimiser step."""
    batch_tokens: PositiveInt | None = None
    """Tokens in one optimiser step, in place of ``batch_size``: a step takes rationales, each with
    its prompt, as long as they do not exceed it."""
    answer_task: AnswerTask | None = None
    """Learn the right answers too, as a task of their own; unset: rationales only."""
    validation: ValidationSettings | None = None
    """Questions kept out of training, to validate on; unset: none, and the last policy is kept."""
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=3e-5)
    """Adam and its schedule."""

    @model_validator(mode="before")
    @classmethod
    def _tokens_replace_the_size(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("batch_tokens") is None:
            return values
        return {"batch_size": None, **values}

    @model_validator(mode="after")
    def _one_measure_of_a_batch(self) -> DistillSettings:
        if (self.batch_size is None) == (self.batch_tokens is None):
            found = "neither is" if self.batch_size is None else "both are"
            raise ValueError(
                "an optimiser step has a number of rationales ('batch_size') or of tokens "
                f"('batch_tokens'), and {found} set: set one of them, and the other to null"
            )
        return self

    @property
    def answer_weight(self) -> float:
        """Weight of the answers' loss; 0 if answers are not learnt."""
        return self.answer_task.weight if self.answer_task is not None else 0.0
