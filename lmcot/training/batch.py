"""A batch: what one step of refinement learns from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcot.actors.kept import Kept
from lmcot.actors.units import Packed, RolloutUnit, Tally, WeightsRef
from lmcot.errors import UserError
from lmcot.records import Columns, Failure, GroupResult, ScoredRollout, Usage
from lmcot.run.budgets import Losses
from lmcot.training.curriculum import Turn
from lmcot.training.questions import Drawn
from lmcot.training.step_metrics import filter_metrics


@dataclass(slots=True)
class Batch:
    """The rationales of one step, from the questions to the judgements."""

    step: int
    """Number of steps before it, so the first is 0."""
    version: int
    """Version of the policy that samples it."""
    weights: WeightsRef
    """Weights of that version, as long as something may have to be sampled, for the first time or
    again."""
    filtered: bool
    """Whether questions that teach nothing are left out."""
    drawn: Drawn
    """Its questions, and those that it may ask in place of others."""
    losses: Losses
    opened: float
    asked: list[Turn] = field(default_factory=list)
    """The questions that it has asked so far, in order."""
    keys: list[str] = field(default_factory=list)
    """Keys of its units, in order."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """State of what draws the questions, for a resume after this step; empty until it is taken."""
    sampled: float = 0.0
    """Time at which the last rationale was sampled."""
    judged: float = 0.0
    """Time at which the last judgement arrived."""
    units: dict[str, RolloutUnit] = field(default_factory=dict)
    """Its units, until it is handed over: one whose rationales are lost is sampled again."""
    sampled_units: set[str] = field(default_factory=set)
    judged_by_unit: dict[str, Tally] = field(default_factory=dict)
    scored_by_unit: dict[str, Kept[Packed[list[ScoredRollout]]]] = field(default_factory=dict)
    """The rationales that are learnt from, until it is handed over."""
    records_by_unit: dict[str, Kept[bytes]] = field(default_factory=dict)
    """The records, until it is handed over."""
    losses_by_unit: Counter[str] = field(default_factory=Counter)
    """How often what a unit came to was lost."""
    records: bytes = b""
    """A line of JSON for each rationale, once it is handed over."""

    @property
    def complete(self) -> bool:
        """Whether all its rationales are judged."""
        return len(self.judged_by_unit) == len(self.keys)

    @property
    def unasked(self) -> list[Turn]:
        """The questions that it was given, but has not asked."""
        return [*self.drawn.first, *self.drawn.further][len(self.asked) :]

    @property
    def results(self) -> list[GroupResult]:
        """What the questions came to whose rationales are judged, in order."""
        units = (self.judged_by_unit[key] for key in self.keys if key in self.judged_by_unit)
        return [result for unit in units for result in unit.results]

    @property
    def learnt(self) -> int:
        """Number of questions that are learnt from; the others are left out."""
        return sum(not result.left_out for result in self.results)

    @property
    def choice_metrics(self) -> dict[str, float]:
        """Which questions were asked and learnt; empty without a filter and a curriculum."""
        wanted = len(self.drawn.first)
        left_out = filter_metrics(self.results, wanted) if self.filtered else {}
        return {**self.drawn.metrics, **left_out}

    @property
    def shown(self) -> dict[str, float]:
        """What the progress line shows of the filter."""
        if not self.filtered:
            return {}
        return {"asked": float(len(self.asked)), "left_out": float(len(self.asked) - self.learnt)}

    @property
    def in_order(self) -> list[Tally]:
        """The judged units in order: in each question by question, K rationales each."""
        return [self.judged_by_unit[key] for key in self.keys]

    @property
    def scored(self) -> list[Kept[Packed[list[ScoredRollout]]]]:
        """The rationales that are learnt from, unit by unit."""
        return [self.scored_by_unit[key] for key in self.keys]

    @property
    def columns(self) -> Columns:
        """The numbers of all its rationales, in order."""
        return Columns.joined([one.columns for one in self.in_order])

    @property
    def failures(self) -> list[Failure]:
        """The judgements that failed."""
        return [failure for one in self.in_order for failure in one.failures]

    @property
    def usage(self) -> Usage:
        """What the frozen LM was asked to judge it."""
        return sum((one.usage for one in self.judged_by_unit.values()), Usage())

    def forget_unit(self, key: str) -> None:
        """Forgets what a unit came to: it is to be sampled and judged again."""
        self.losses_by_unit[key] += 1
        self.sampled_units.discard(key)
        self.scored_by_unit.pop(key, None)
        self.records_by_unit.pop(key, None)
        tally = self.judged_by_unit.pop(key, None)
        if tally is not None:  # its failures are counted already, and so may be once more
            self.losses.expect(len(tally.columns["judged"]))

    def let_go(self) -> None:
        """Lets the object store drop what was handed over, and the weights."""
        self.weights = ()
        for kept in (self.units, self.scored_by_unit, self.records_by_unit):
            kept.clear()


def check_staleness(columns: Columns, version: int, limit: int) -> None:
    """Refuses rationales that were sampled by a policy older than the limit allows.

    Args:
        version: of the policy that is about to learn from them.

    Raises:
        RuntimeError: naming the version that is too old.
    """
    for sampled_by in np.unique(columns["policy_version"]):
        if not 0 <= version - sampled_by <= limit:
            raise RuntimeError(
                f"a rationale was sampled by policy version {sampled_by:.0f}, but version "
                f"{version} admits only those of the last {limit} versions and its own "
                "(refine.max_staleness)"
            )


def check_judged(columns: Columns, failures: Sequence[Failure]) -> None:
    """Refuses a batch without a single judgement, whatever the budgets for failures say.

    Raises:
        UserError: naming the first failure.
    """
    if not columns["judged"].any():
        raise UserError(
            f"none of a step's {len(columns['judged'])} rationales could be judged; the first "
            f"failure: {failures[0].reason}; fix that and run the same command again"
        )
