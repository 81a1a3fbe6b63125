"""Settings of rejection sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmcot import run_files
from lmcot.config.base import PositiveFloat, PositiveInt
from lmcot.config.distill import DistillSettings
from lmcot.config.teachers import FilterSettings, RightAnswer


class RejectSettings(DistillSettings, RightAnswer):
    """Rejection sampling: supervised training on the small LM's own best right rationales.

    In each round the policy of the round before samples rationales, the rewards judge them, and
    the small LM learns the best of those with which the frozen LM's answer is right.
    """

    start_from: Literal["distilled", "base"] = run_files.DISTILLED
    """Policy that samples in the first round: the distilled one, or the small LM without training.
    Later rounds sample with the policy of the round before."""
    rounds: PositiveInt = 1
    """Rounds of sampling, judging and training."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Rationales sampled for each question in a round."""
    temperature: PositiveFloat | None = None
    """Sampling temperature; unset: ``policy.temperature``."""
    keep: PositiveInt = 1
    """Most rationales that are kept of a question in a round: the right ones with the highest
    reward."""
    filters: FilterSettings = FilterSettings()
    """What a rationale must not be, to be kept."""
    teacher_rationales: bool = True
    """Whether the teacher's kept rationales are learnt too; if not, those that were sampled replace
    them."""
    train_from: Literal["base", "round"] = "base"
    """What a round trains: the small LM without training (as in ReST-EM, Singh et al. 2023, and
    STaR, Zelikman et al. 2022), or the policy that sampled in the round (``round``)."""

    @model_validator(mode="after")
    def _enough_samples(self) -> RejectSettings:
        if self.keep > self.samples:
            raise ValueError(
                f"keep is {self.keep}, but a question has only {self.samples} samples in a round "
                "(samples): lower the one or raise the other"
            )
        return self
