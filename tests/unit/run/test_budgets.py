"""Budgets of a run: requests to the frozen LM, and failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcot.config import BudgetSettings, FailureBudgets
from lmcot.errors import UserError
from lmcot.records import Failure, FailureKind, Usage
from lmcot.run.budgets import Losses, Spending

DOWN = Failure(FailureKind.TRANSIENT, "the endpoint is down")
REFUSED = Failure(FailureKind.PERMANENT, "the prompt is refused")


def _spending(tmp_path: Path, **limits: int) -> Spending:
    return Spending(tmp_path / "spending.json", BudgetSettings(**limits))


def _spent(folder: Path) -> Usage:
    stages = json.loads((folder / "spending.json").read_text(encoding="utf-8"))
    return sum((Usage(**one) for one in stages.values()), Usage())


def test_spending_adds_up_over_stages_and_resumptions(tmp_path: Path) -> None:
    first = _spending(tmp_path)
    first.add("annotate", Usage(5, 4, 100))
    first.add("refine", Usage(3, 3, 50))
    first.save()
    again = _spending(tmp_path)
    again.add("refine", Usage(1, 0, 0))
    again.save()
    assert _spent(tmp_path) == Usage(9, 7, 150)


@pytest.mark.parametrize(
    ("key", "limit", "unit"), [("max_requests", 7, "requests"), ("max_tokens", 150, "tokens")]
)
def test_the_run_stops_once_the_budget_is_passed(
    tmp_path: Path, key: str, limit: int, unit: str
) -> None:
    spending = _spending(tmp_path, **{key: limit})
    spending.add("annotate", Usage(5, 4, 100))
    spending.check()
    spending.add("refine", Usage(3, 3, 50))  # just reached: what came is used
    with pytest.raises(
        UserError,
        match=rf"{limit} {unit} so far .annotate \d+, refine \d+., frozen\.budget\.{key} is",
    ):
        spending.check()  # but nothing more is asked
    with pytest.raises(UserError, match="raise it and run the same command again"):
        spending.add("refine", Usage(1, 1, 1))
    spending.save()
    assert _spent(tmp_path) == Usage(9, 8, 151)  # what was spent is on disk all the same
    _spending(tmp_path, **{key: limit + 2}).check()


def test_it_is_on_disk_a_second_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at once: with hundreds of actors that were a file for every few milliseconds."""
    now = 100.0
    monkeypatch.setattr("lmcot.run.budgets.time.monotonic", lambda: now)
    spending = _spending(tmp_path)
    spending.add("refine", Usage(1, 1, 1))
    now += 0.5
    spending.add("refine", Usage(1, 1, 1))
    assert _spent(tmp_path) == Usage(1, 1, 1)
    now += 0.6
    spending.add("refine", Usage(1, 1, 1))
    assert _spent(tmp_path) == Usage(3, 3, 3)


def test_what_the_cache_answers_costs_nothing(tmp_path: Path) -> None:
    spending = _spending(tmp_path, max_requests=1)
    spending.add("refine", Usage(asked=100, sent=0, tokens=0))
    spending.check()


def test_losses_have_separate_budgets() -> None:
    budgets = FailureBudgets(max_infrastructure_share=0.5, max_data_share=0.2)
    losses = Losses(budgets, 10, "judgements of step 3")
    losses.add([DOWN, None, DOWN, REFUSED, DOWN, None])
    losses.add([DOWN, REFUSED, DOWN])  # five and two of ten: both just within
    with pytest.raises(UserError) as data:
        losses.add([REFUSED])
    assert str(data.value) == (
        "3 of 10 judgements of step 3 failed, more than failures.max_data_share (0.2) allows; the "
        "first: the prompt is refused; fix that and run the same command again"
    )
    with pytest.raises(UserError, match=r"6 of 10 .*max_infrastructure_share \(0\.5\).*is down"):
        losses.add([DOWN])


def test_no_losses_are_admitted_at_zero() -> None:
    losses = Losses(FailureBudgets(max_infrastructure_share=0, max_data_share=0), 4, "answers")
    losses.add([None, None])
    with pytest.raises(UserError, match="1 of 4 answers"):
        losses.add([DOWN])
