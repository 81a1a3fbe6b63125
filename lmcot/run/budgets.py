"""A run's budgets: requests to the frozen LM, and failures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from lmcot.config import BudgetSettings, FailureBudgets
from lmcot.errors import UserError
from lmcot.files import read_object, write_atomically
from lmcot.records import Failure, FailureKind, Usage

_SAVE_EVERY_S = 1.0


class Spending:
    """A run's requests to the frozen LM so far, by stage, over all its sessions.

    It is on disk about a second later: a run that is killed forgets its last units at most.
    """

    def __init__(self, path: Path, budget: BudgetSettings) -> None:
        self._path = path
        self._budget = budget
        self._saved = -math.inf
        self._spent: dict[str, Usage]
        remedy = "put it back from a copy, or delete it to count from 0 again"
        try:
            self._spent = {one: Usage(**used) for one, used in read_object(path, remedy).items()}
        except TypeError as error:
            raise UserError(f"the file '{path}' is damaged ({error}): {remedy}") from None

    def add(self, stage: str, usage: Usage) -> None:
        """Counts a unit's requests.

        Raises:
            UserError: if the run has passed its budget with them.
        """
        self._spent[stage] = self._spent.get(stage, Usage()) + usage
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self.save()
        self._check(over=1)

    def save(self) -> None:
        """Writes the counts to disk."""
        if not self._spent:
            return
        stages = {name: asdict(spent) for name, spent in self._spent.items()}
        write_atomically(self._path, json.dumps(stages, indent=1) + "\n")
        self._saved = time.monotonic()

    def check(self) -> None:
        """Checks the budget before further requests.

        Raises:
            UserError: if the budget is spent.
        """
        self._check(over=0)

    @property
    def nothing_left(self) -> bool:
        """Whether a limit of the budget is reached."""
        return self._reached(over=0) is not None

    def _check(self, over: int) -> None:
        if (reached := self._reached(over)) is None:
            return
        key, unit, limit, spent = reached
        shares = ", ".join(f"{stage} {count}" for stage, count in spent.items())
        raise UserError(
            f"the frozen LM's budget is spent: {sum(spent.values())} {unit} so far ({shares}), "
            f"frozen.budget.{key} is {limit}; progress is saved: raise it and run the same "
            "command again"
        )

    def _reached(self, over: int) -> tuple[str, str, int, dict[str, int]] | None:
        """The first limit that is reached: its key, unit and value, and each stage's spending."""
        requests = {stage: used.sent for stage, used in self._spent.items()}
        tokens = {stage: used.tokens for stage, used in self._spent.items()}
        limits = (
            ("max_requests", "requests", self._budget.max_requests, requests),
            ("max_tokens", "tokens", self._budget.max_tokens, tokens),
        )
        for key, unit, limit, spent in limits:
            if limit is not None and sum(spent.values()) >= limit + over:
                return key, unit, limit, spent
        return None


class Losses:
    """Failures of one step or stage, counted against their budgets."""

    def __init__(self, budgets: FailureBudgets, total: int, what: str) -> None:
        """Args: what: the things lost and where, as in "judgements of step 3"."""
        self._total = total
        self._what = what
        self._budgets = {
            FailureKind.TRANSIENT: ("max_infrastructure_share", budgets.max_infrastructure_share),
            FailureKind.PERMANENT: ("max_data_share", budgets.max_data_share),
        }
        self._first: dict[FailureKind, Failure] = {}
        self._lost = dict.fromkeys(FailureKind, 0)

    def expect(self, number: int) -> None:
        """Counts further things that may be lost."""
        self._total += number

    def add(self, failures: Iterable[Failure | None]) -> None:
        """Counts the failures among some results.

        Raises:
            UserError: as soon as one kind exceeds its share of the total.
        """
        for failure in failures:
            if failure is not None:
                self._lost[failure.kind] += 1
                self._first.setdefault(failure.kind, failure)
        for kind, (key, share) in self._budgets.items():
            if self._lost[kind] > share * self._total:
                raise UserError(
                    f"{self._lost[kind]} of {self._total} {self._what} failed, more than "
                    f"failures.{key} ({share:g}) allows; the first: {self._first[kind].reason}; "
                    "fix that and run the same command again"
                )


def usage_metrics(usage: Usage) -> dict[str, float]:
    """Metrics of requests to the frozen LM: their number, the cache's share, tokens of the
    others."""
    if not usage.asked:
        return {}
    return {
        "frozen/requests": float(usage.asked),
        "frozen/cache_hit_rate": 1 - usage.sent / usage.asked,
        "frozen/tokens": float(usage.tokens),
    }
