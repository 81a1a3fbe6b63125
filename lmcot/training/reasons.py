"""Why a rationale was kept or rejected: the reasons that several modules write, and read again."""

from __future__ import annotations

from typing import Final

from lmcot.records import Annotation

RIGHT: Final = "right answer"
FAILED: Final = "failed: "
WITH_HINT: Final = "with the answer as a hint: "
NEAR_DUPLICATE: Final = "good, but nearly the same as another rationale"
ANOTHER_IS_BETTER: Final = "good, but another one of the question is better"


def is_good(one: Annotation) -> bool:
    """Whether a rationale passed all filters, whether or not it was chosen."""
    return one.kept or one.reason in (NEAR_DUPLICATE, ANOTHER_IS_BETTER)


def failed(one: Annotation) -> bool:
    """Whether the teacher gave no reply."""
    return FAILED in one.reason
