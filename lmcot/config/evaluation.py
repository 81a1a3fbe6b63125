"""Settings of the evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lmcot.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Settings
from lmcot.config.rows import Row
from lmcot.config.stages import TrainedPolicy


class DuringSettings(Settings):
    """Evaluation of the policy while it is refined, on actors that would otherwise wait."""

    every: NonNegativeInt = 0
    """Steps between two evaluations, the first one before the first step; 0: none."""
    questions: PositiveInt = 50
    """Number of questions, the first ones of ``data.validation``."""
    metric: Literal["em", "f1", "inclusion"] = "f1"
    """Metric of the guided answers to those questions by which the best policy is chosen."""
    keep_best: bool = True
    """Whether the best policy is kept, as ``best/`` in the run directory."""


class EvaluateSettings(Settings):
    """What is measured at the end."""

    rows: tuple[Row, ...] | None = None
    """Rows of the report; unset: ``standard``, ``cot``, ``small_alone`` and ``guided_POLICY`` of
    each existing policy. Rows that are named here must be possible."""
    policies: dict[TrainedPolicy, str | None] = Field(default_factory=dict)
    """Model sources of trained policies by name, such as ``refined: runs/mine/best``. A policy that
    is not named here, or is null, is the run's own, if it has one."""
    samples: Annotated[int, Field(ge=2)] = 5
    """Rationales (answers, where the frozen LM is alone) that a ``+sc`` row votes over."""
    temperature: PositiveFloat = 0.7
    """Sampling temperature of the ``+sc`` rows; other rows are greedy."""
    choices: Literal["reply", "probability"] = "reply"
    """How the frozen LM chooses among a question's options (tasks ``boolean`` and
    ``multiple_choice``): by what it writes, or ``probability``, as the option that it finds
    likeliest after the prompt, which needs a backend that gives probabilities. Rows that reason
    before they answer, that vote over replies, or in which the small LM answers alone go by what
    was written in either case."""
    aspect_questions: NonNegativeInt = 100
    """Questions whose rationales are judged by aspect, for each policy; 0: none. It costs as much
    as a reward, and needs ``rewards.kind`` 'guidance'."""
    during: DuringSettings = DuringSettings()
    """Evaluation during refinement."""
    allow_overlap: bool = False
    """Whether validation questions may also be in the training set."""

    def given_source(self, policy: str) -> str | None:
        """The model source that the settings name for a trained policy; None if they name none."""
        return self.policies.get(policy)
