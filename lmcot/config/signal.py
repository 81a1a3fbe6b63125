"""Which questions a step of refinement asks, and which of them it learns from."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lmcot.config.base import NonNegativeFloat, PositiveInt, Settings


class SignalFilter(Settings):
    """Leaves questions out whose rationales all measure the same, and asks others in their place.

    A group baseline learns nothing from such a question (DAPO's dynamic sampling: Yu et al. 2025,
    arXiv 2503.14476, section 3.2).
    """

    by: Literal["task", "right", "reward"] = "task"
    """What a question's rationales are compared by. ``task``: the weighted sum of exact match, F1
    and inclusion, so that no difference of style between wrong rationales becomes an advantage.
    ``right``: whether the rationale is right, so that half an answer counts as none. ``reward``:
    the whole reward, with aspects, rewards of one's own and penalties."""
    refill: NonNegativeFloat = 1.0
    """How many further questions a step may ask in place of those left out, as a multiple of
    ``refine.prompts_per_step``; 0: none. A step that has asked so many learns from what it has."""


class CurriculumSettings(Settings):
    """Lets questions rest that were solved, or never solved, in their last tries.

    A try is a step that asked the question: it is solved if all its judged rationales were right,
    and unsolved if none was.
    """

    solved: PositiveInt | None = 2
    """A question rests whose last so many tries were all solved; null: none does."""
    unsolved: PositiveInt | None = 3
    """A question rests whose last so many tries were all unsolved; null: none does."""
    rest: PositiveInt = 1
    """Epochs that a question rests; then it is asked again, and rests again if that try is like
    those before. If fewer questions than ``refine.prompts_per_step`` are awake, those whose rest
    ends first are woken."""

    @model_validator(mode="after")
    def _something_rests(self) -> CurriculumSettings:
        if self.solved is None and self.unsolved is None:
            raise ValueError(
                "solved and unsolved are both null, so that no question ever rests: give one of "
                "them a number of tries, or leave refine.curriculum out"
            )
        return self
