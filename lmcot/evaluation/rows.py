"""Which rows an evaluation has, and what the frozen LM is shown in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lmcot.config import Config, EvaluateSettings
from lmcot.config.rows import ROWS, Need, RowSpec, Shown, find_row
from lmcot.config.stages import TRAINING_STAGES
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.errors import UserError
from lmcot.records import Example


def chosen_rows(settings: EvaluateSettings, policies: Sequence[str]) -> list[RowSpec]:
    """The rows that are evaluated, in the report's order.

    Raises:
        UserError: if a row was asked for whose policy is not there.
    """
    asked = settings.rows
    rows = []
    for one in ROWS.values():
        if not (one.default if asked is None else one.name in asked):
            continue
        policy = one.policy_among(policies)
        if policy and policy not in policies:
            if asked is None:
                continue
            raise UserError(
                f"evaluate.rows holds '{one.name}', but there is no {policy} policy: "
                f"{_way_to(policy)}, or take the row out"
            )
        rows.append(one)
    if not rows:
        raise UserError("evaluate.rows is empty: name a row, or leave it unset")
    return rows


def chooses(config: Config, row: RowSpec) -> bool:
    """Whether the frozen LM chooses among a question's options in a row, by their probabilities."""
    return config.evaluate.choices == "probability" and row.may_choose


def _way_to(policy: str) -> str:
    """How to get a policy that is missing."""
    stage = next(one for one in TRAINING_STAGES if one.policy == policy)
    return f"run 'lmcot {stage.name}' on the run directory, or set evaluate.policies.{policy}"


def check_rows(rows: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuses questions that lack what the rows need.

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
    for one in map(find_row, rows):
        for need in one.needs:
            meets, otherwise = _NEEDS[need]
            if not meets(examples):
                raise UserError(f"the row {one.name} needs {need}, but {otherwise}")


_NEEDS: dict[Need, tuple[Callable[[Sequence[Example]], bool], str]] = {
    "another question": (lambda examples: len(examples) > 1, "there is only one"),
    "supporting facts": (
        lambda examples: any(one.gold_sentences() for one in examples),
        "data.validation has none: take it out of evaluate.rows",
    ),
    "passages": (
        lambda examples: any(one.context for one in examples),
        "data.validation has none, so that it would repeat another row: take it out of "
        "evaluate.rows",
    ),
}
"""Whether the questions have what a row needs, and what to say if they do not."""


def shown_texts(
    row: RowSpec,
    examples: Sequence[Example],
    written: Mapping[str, Sequence[str]],
    seed: int,
    task: Task = EXTRACTIVE_QA,
) -> list[list[str]]:
    """The rationales that a row shows with each question: none, one, or as many as vote.

    Args:
        written: what the row's policy wrote for each question, by id; empty without policy.
    """
    if row.shown is None:
        return [[] for _ in examples]
    if row.votes:
        return [list(written[one.id]) for one in examples]
    greedy = {key: texts[0] for key, texts in written.items()}
    return [
        [row.shown(Shown(examples, at, greedy, seed, task.mentions))] for at in range(len(examples))
    ]
