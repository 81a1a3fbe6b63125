"""A batch: what one step of refinement learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lmcot.actors.units import Packed, Scored
from lmcot.errors import UserError
from lmcot.records import Columns, Example, Failure, ScoredRollout, Usage
from lmcot.run.budgets import Losses


@dataclass(slots=True)
class Batch:
    """The rationales of one step, from the questions to the judgements."""

    step: int
    """Number of steps before it, so the first is 0."""
    version: int
    """Version of the policy that samples it."""
    sampler: dict[str, int]
    """State of the prompt sampler after the questions were drawn."""
    keys: list[str]
    """Keys of its units, in order."""
    losses: Losses
    opened: float
    sampled: float = 0.0
    """Time at which the last rationale was sampled."""
    judged: float = 0.0
    """Time at which the last judgement arrived."""
    questions: dict[str, Packed[tuple[Example, ...]]] = field(default_factory=dict)
    """Questions of the units that are not sampled yet."""
    sampled_units: int = 0
    judged_by_unit: dict[str, Scored] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all its rationales are judged."""
        return len(self.judged_by_unit) == len(self.keys)

    @property
    def in_order(self) -> list[Scored]:
        """The judged units in order: in each question by question, K rationales each."""
        return [self.judged_by_unit[key] for key in self.keys]

    @property
    def scored(self) -> list[Packed[list[ScoredRollout]]]:
        """The rationales that have a reward, unit by unit."""
        return [one.scored for one in self.in_order]

    @property
    def columns(self) -> Columns:
        """The numbers of all its rationales, in order."""
        return Columns.joined([one.columns for one in self.in_order])

    @property
    def records(self) -> bytes:
        """A line of JSON for each rationale."""
        return b"".join(one.records for one in self.in_order)

    @property
    def failures(self) -> list[Failure]:
        """The judgements that failed."""
        return [failure for one in self.in_order for failure in one.failures]

    @property
    def usage(self) -> Usage:
        """What the frozen LM was asked to judge it."""
        return sum((one.usage for one in self.judged_by_unit.values()), Usage())


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
