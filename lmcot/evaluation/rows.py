"""Which rows an evaluation asks, and what the frozen LM reads in each."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import get_args

from lmcot.config import EvaluateSettings, Row
from lmcot.config.rows import DEFAULT_ROWS, policy_of
from lmcot.errors import UserError
from lmcot.records import Example

MASK = "___"
_MISSING = {
    "distilled": "run 'lmcot distill' on the run directory, or set evaluate.distilled",
    "refined": "run 'lmcot refine' on the run directory, or set evaluate.refined",
}


def chosen_rows(settings: EvaluateSettings, policies: Sequence[str]) -> list[Row]:
    """The rows that are evaluated, in the report's order.

    Raises:
        UserError: if a row was asked for whose policy is not there.
    """
    asked = settings.rows
    rows: list[Row] = []
    for row in get_args(Row):
        if row not in (DEFAULT_ROWS if asked is None else asked):
            continue
        policy = policy_of(row, policies)
        if policy and policy not in policies:
            if asked is None:
                continue
            raise UserError(
                f"evaluate.rows holds '{row}', but there is no {policy} policy: "
                f"{_MISSING[policy]}, or take the row out"
            )
        rows.append(row)
    if not rows:
        raise UserError("evaluate.rows is empty: name a row, or leave it unset")
    return rows


def check_rows(rows: Sequence[Row], examples: Sequence[Example]) -> None:
    """Whether the questions allow the rows.

    Raises:
        UserError: naming the row, and what it needs.
    """
    if not examples:
        raise UserError("data.validation holds no questions to evaluate on")
    ids = [one.id for one in examples]
    if twice := [key for key, count in Counter(ids).items() if count > 1]:
        raise UserError(
            f"data.validation holds several questions of the id '{twice[0]}': predictions are kept "
            "by id, so give each its own"
        )
    if "control_shuffled" in rows and len(examples) < 2:
        raise UserError("the row control_shuffled needs another question, but there is only one")
    if "control_oracle" in rows and not any(one.gold_sentences() for one in examples):
        raise UserError(
            "the row control_oracle needs supporting facts, but data.validation has none: take it "
            "out of evaluate.rows"
        )


def shown_rationale(
    row: str, index: int, examples: Sequence[Example], greedy: Mapping[str, str], seed: int
) -> str:
    """What a row shows as the rationale of ``examples[index]``.

    Args:
        greedy: the policy's rationale of each question, by its id.
    """
    example = examples[index]
    if row == "control_empty":
        return ""
    if row == "control_oracle":
        return " ".join(example.gold_sentences())
    if row == "control_shuffled":
        return greedy[examples[_other(index, len(examples), seed)].id]
    if row == "control_masked":
        return masked(greedy[example.id], example.answers)
    return greedy[example.id]


def masked(rationale: str, golds: str | Sequence[str]) -> str:
    """The rationale with a mark wherever a right answer stands in it, in whatever case.

    An article ("A", the letter of an option) stands everywhere: it must have the answer's case.
    """
    # Longer ones first: "State of Velm" is not left as "State of ___".
    several = [golds] if isinstance(golds, str) else golds
    for gold in sorted(several, key=len, reverse=True):
        words = gold.split()
        if not words:
            continue
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
        case = re.NOFLAG if gold.strip().lower() in ("a", "an", "the") else re.IGNORECASE
        rationale = re.sub(pattern, MASK, rationale, flags=case)
    return rationale


def _other(index: int, count: int, seed: int) -> int:
    """Another index for each, and each for another one: a step around the circle."""
    step = random.Random(f"{seed}/shuffled").randrange(1, count)
    return (index + step) % count
