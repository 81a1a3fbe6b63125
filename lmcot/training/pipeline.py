"""Batches on their way from questions to judged rationales, while the learners learn.

The policy of version v may sample the batches up to step v + ``max_staleness``: a batch is opened
as soon as that version is there, all of it is sampled by that version, and it is learnt in its
turn. Hence what a batch holds depends neither on how many actors there are nor on how fast they
work, at no staleness; and there are never more than ``max_staleness`` + 1 batches to keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmcot.actors.base import Unanswered
from lmcot.actors.fleet import Fleet
from lmcot.actors.learner_group import PendingCall
from lmcot.actors.ledger import UnitLost
from lmcot.actors.news import wait_for_news
from lmcot.actors.units import Packed, RolloutUnit, Scored, ScoreUnit
from lmcot.data.sampler import PromptSampler
from lmcot.errors import UserError
from lmcot.frozen.cached import Replies
from lmcot.records import Columns, Example, Failure, Rollout, RunState, ScoredRollout, Usage
from lmcot.run.budgets import Losses
from lmcot.run.context import Run, in_units


class Watched(Protocol):
    """Learners, as far as their health goes."""

    def refs(self) -> list[Any]:
        """What a wait for news of it waits for."""

    def check(self) -> None:
        """Raises `LearnerLost` if a rank is known to be dead; never waits."""

    def probe(self) -> None:
        """Raises `LearnerLost` if a rank turns out to be dead."""


@dataclass(slots=True)
class Fleets:
    """The actors that batches go through."""

    rollout: Fleet
    reward: Fleet
    frozen: Fleet | None = None

    @property
    def all(self) -> list[Fleet]:
        """In no order that matters."""
        return [self.rollout, self.reward, *([self.frozen] if self.frozen else [])]

    def wait_ready(self) -> None:
        """Waits until all actors have set themselves up; raises as `Fleet.wait_ready` does."""
        if self.frozen is not None:
            self.frozen.wait_ready()
        self.rollout.wait_ready()
        self.reward.wait_ready(frozen_handles=self.frozen.handles if self.frozen else [])


@dataclass(slots=True)
class Batch:
    """What one step learns from, as it grows."""

    step: int
    """Counts from 0: how many steps come before."""
    version: int
    """Of the policy that samples it."""
    sampler: dict[str, int]
    """State of the prompt sampler after its questions were drawn."""
    keys: list[str]
    """Its units, in order."""
    losses: Losses
    opened: float
    sampled: float = 0.0
    """When its last rationale had been sampled."""
    judged: float = 0.0
    """When its last judgement had come."""
    questions: dict[str, Packed[tuple[Example, ...]]] = field(default_factory=dict)
    """Of the units that are not judged yet."""
    sampled_units: int = 0
    judged_by_unit: dict[str, Scored] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all its rationales are judged."""
        return len(self.judged_by_unit) == len(self.keys)

    @property
    def in_order(self) -> list[Scored]:
        """What came of its units: unit by unit, in each question by question, K each."""
        return [self.judged_by_unit[key] for key in self.keys]

    @property
    def scored(self) -> list[Packed[list[ScoredRollout]]]:
        """What can be learnt from, unit by unit."""
        return [one.scored for one in self.in_order]

    @property
    def columns(self) -> Columns:
        """The numbers of all its rationales, in their order."""
        return Columns.joined([one.columns for one in self.in_order])

    @property
    def records(self) -> bytes:
        """A line of JSON for each rationale."""
        return b"".join(one.records for one in self.in_order)

    @property
    def failures(self) -> list[Failure]:
        """What was got in place of judgements."""
        return [failure for one in self.in_order for failure in one.failures]

    @property
    def usage(self) -> Usage:
        """What the frozen LM was asked for it."""
        return sum((one.usage for one in self.judged_by_unit.values()), Usage())


class Guest(Protocol):
    """Who else has work done by the fleets."""

    def sampled(self, key: str, rollouts: Packed[list[Rollout]]) -> None:
        """A unit of rationales came."""

    def answered(self, key: str, replies: Replies) -> None:
        """A unit of the frozen LM's replies came."""

    def abandon(self) -> None:
        """Its units are forgotten."""


class Pipeline:
    """The batches that are open, and what is done with each piece of news."""

    def __init__(
        self,
        run: Run,
        fleets: Fleets,
        learners: Watched,
        state: RunState,
        guest: Guest | None = None,
    ) -> None:
        """Begins after ``state``'s last step, with no batch open.

        Args:
            guest: whose units the fleets do beside those of the batches.
        """
        self._run = run
        self._fleets = fleets
        self._learners = learners
        self._guest = guest
        self._stage = state.stage
        self._next = state.step
        self._sampler = PromptSampler(len(run.train), run.config.seed)
        self._sampler.restore(state.sampler)
        self._batches: dict[int, Batch] = {}
        self._of_unit: dict[str, Batch] = {}
        self._trouble: UserError | None = None
        self.frozen_seconds = 0.0
        """That the frozen LM's actors have worked so far."""

    def wants(self, version: int) -> bool:
        """Whether the policy of this version may sample batches that are not open yet."""
        return self._next < self._end(version)

    def open(self, version: int, weights: Sequence[Any]) -> None:
        """Opens all batches that the policy of this version may sample.

        Args:
            weights: the object reference of its weights, if it is not the actors' own source.
        """
        while self._next < self._end(version):
            self._open(version, tuple(weights))
            self._next += 1

    def _end(self, version: int) -> int:
        refine = self._run.config.refine
        return min(version + refine.max_staleness + 1, refine.steps)

    def units_in_flight(self) -> list[str]:
        """Units of all open batches that are not judged yet."""
        return [
            key
            for batch in self._batches.values()
            for key in batch.keys
            if key not in batch.judged_by_unit
        ]

    def ready(self) -> int:
        """How many open batches only wait to be learnt."""
        return sum(batch.complete for batch in self._batches.values())

    def take(self, step: int) -> Batch:
        """The batch of a step; waits until all of it is judged.

        Raises:
            UserError: if too much of a batch failed, or the frozen LM's budget is spent.
            LearnerLost: if a learner died meanwhile.
        """
        if self._trouble is not None:
            raise self._trouble
        batch = self._batches[step]
        while not batch.complete:
            self._run.interruption.check()
            self._turn()
            if not batch.complete:
                wait_for_news(*self._fleets.all, self._learners)
        del self._batches[step]
        for key in batch.keys:
            del self._of_unit[key]
        return batch

    def work_until(self, pending: PendingCall) -> PendingCall:
        """Keeps the others at work until the learners are done with a call.

        What goes wrong for the user to mend is raised by the next `take`, so that the learners'
        step is not lost with it.
        """
        while not pending.done():
            if self._trouble is None:
                try:
                    self._turn()
                except UserError as error:
                    self._trouble = error
            wait_for_news(*self._fleets.all, self._learners, pending)
        return pending

    def abandon(self) -> None:
        """Forgets all open batches."""
        for fleet in self._fleets.all:
            fleet.abandon()
        if self._guest is not None:
            self._guest.abandon()

    def _turn(self) -> None:
        """Takes in what came, and hands on what follows from it."""
        self._learners.check()
        try:
            if self._fleets.frozen is not None:
                for key, replies in self._fleets.frozen.turn():
                    self._guests.answered(key, replies)
            for key, rollouts in self._fleets.rollout.turn():
                if key in self._of_unit:
                    self._sampled(key, rollouts)
                else:
                    self._guests.sampled(key, rollouts)
            for key, judged in self._fleets.reward.turn():
                self._judged(key, judged)
        except (UnitLost, Unanswered):
            self._learners.probe()  # weights are gone with the learner that held them
            raise

    @property
    def _guests(self) -> Guest:
        if self._guest is None:
            raise RuntimeError("a fleet did a unit that nobody asked for")
        return self._guest

    def work_off(self, until: Callable[[], bool]) -> None:
        """Keeps the actors at work until something is the case.

        Raises: as `take` does.
        """
        while not until():
            self._run.interruption.check()
            self._turn()
            if not until():
                wait_for_news(*self._fleets.all, self._learners)

    def _open(self, version: int, weights: tuple[Any, ...]) -> None:
        config = self._run.config
        rows = self._sampler.next(config.refine.prompts_per_step)
        groups = in_units(rows, config.actors.prompts_per_unit)
        keys = [f"step-{self._next + 1}/{number}" for number in range(len(groups))]
        total = len(rows) * config.refine.samples_per_prompt
        batch = Batch(
            step=self._next,
            version=version,
            sampler=self._sampler.state(),
            keys=keys,
            losses=Losses(config.failures, total, f"judgements of step {self._next + 1}"),
            opened=time.monotonic(),
        )
        self._batches[self._next] = batch
        for key, group in zip(keys, groups, strict=True):
            questions = Packed.of(tuple(self._run.train[row].example for row in group))
            batch.questions[key] = questions
            self._of_unit[key] = batch
            unit = RolloutUnit(
                unit_id=key,
                questions=questions,
                samples=config.refine.samples_per_prompt,
                temperature=config.policy.temperature,
                max_new_tokens=config.policy.max_new_tokens,
                seed=config.seed,
                step=self._next,
                policy_version=version,
                weights=weights,
            )
            self._fleets.rollout.submit("sample", key, unit)

    def _sampled(self, key: str, rollouts: Packed[list[Rollout]]) -> None:
        """A unit's rationales go on to be judged, while others are still being sampled."""
        batch = self._of_unit[key]
        batch.sampled_units += 1
        if batch.sampled_units == len(batch.keys):
            batch.sampled = time.monotonic()
        unit = ScoreUnit(key, batch.questions.pop(key), rollouts)
        self._fleets.reward.submit("score", key, unit)

    def _judged(self, key: str, judged: Scored) -> None:
        batch = self._of_unit[key]
        batch.judged_by_unit[key] = judged
        if batch.complete:
            batch.judged = time.monotonic()
        self.frozen_seconds += judged.frozen_seconds
        self._run.spending.add(self._stage, judged.usage)
        self._run.tell_unmeasured(judged.unmeasured)
        batch.losses.add(judged.failures)
