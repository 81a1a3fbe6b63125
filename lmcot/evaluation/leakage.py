"""Finds questions of the training set among those of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from lmcot.errors import UserError
from lmcot.records import Example
from lmcot.text.answers import normalize_answer

_NAMED = 3


def overlap(train: Sequence[Example], validation: Sequence[Example]) -> list[str]:
    """Ids of the validation questions that are in the training set too, with the same id or the
    same words (normalised as answers are)."""
    ids = {one.id for one in train}
    questions = {normalize_answer(one.question) for one in train}
    return [
        one.id for one in validation if one.id in ids or normalize_answer(one.question) in questions
    ]


def check_overlap(
    train: Sequence[Example], validation: Sequence[Example], *, allowed: bool
) -> str | None:
    """Refuses to evaluate on questions of the training set.

    Args:
        allowed: whether to give a note instead.

    Returns:
        the note; None if no question is in both.

    Raises:
        UserError: with the number of such questions and some of their ids.
    """
    found = overlap(train, validation)
    if not found:
        return None
    some = ", ".join(found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    told = f"{len(found)} of {len(validation)} questions of data.validation are in data.train too"
    if allowed:
        return f"{told} ({some})."
    raise UserError(
        f"{told}, by their id or their words ({some}): a policy cannot be measured on what it "
        "learnt from; choose other data, or set evaluate.allow_overlap to true"
    )
