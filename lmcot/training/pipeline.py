"""Samples and judges batches in the background, while the learners learn.

The policy of version v samples the batches up to step v + ``max_staleness``. A batch is opened as
soon as its version is published, one version samples all of it, and batches are learnt in order. So
the content of a batch depends neither on the number of actors nor on their speed, and at most
``max_staleness`` + 1 batches are open. A batch may ask further questions in place of those that
teach nothing (``refine.filter``); which these can be is settled when it is opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from lmcot.actors.base import Unanswered
from lmcot.actors.fleet import Fleet
from lmcot.actors.frozen_actor import FrozenActor
from lmcot.actors.kept import Kept, fetch
from lmcot.actors.ledger import UnitLost
from lmcot.actors.news import Source, wait_for_news
from lmcot.actors.reward_actor import RewardActor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import KeptScoreUnit, Packed, RolloutUnit, Tally, WeightsRef
from lmcot.config import GivenDemonstrations
from lmcot.errors import UserError
from lmcot.monitor.progress import say
from lmcot.records import RunState, ScoredRollout
from lmcot.run.budgets import Losses
from lmcot.run.context import Run, in_units
from lmcot.training.batch import Batch, check_judged, check_staleness
from lmcot.training.curriculum import Turn
from lmcot.training.questions import Questions

_Result = TypeVar("_Result")
_Awaited = TypeVar("_Awaited", covariant=True)


class Awaited(Protocol[_Awaited]):
    """A call to the learners that is under way, as far as the pipeline waits for it."""

    def refs(self) -> list[Any]:
        """Object references that become ready when there is news of it."""

    def done(self) -> bool:
        """Whether it is done; never waits."""

    def result(self) -> _Awaited:
        """Waits for the result."""


class Learning(Protocol):
    """The learners, as far as the pipeline watches their health and hands batches over."""

    def fetch(self, units: list[Kept[Packed[list[ScoredRollout]]]]) -> Awaited[set[int]]:
        """Has the learners fetch units from the object store; returns which are lost."""

    def refs(self) -> list[Any]:
        """Object references that become ready when there is news of a rank."""

    def check(self) -> None:
        """Raises `LearnerLost` if a rank is known to be dead; never waits."""

    def probe(self) -> None:
        """Raises `LearnerLost` if a rank turns out to be dead."""


@dataclass(slots=True)
class Fleets:
    """The actors that sample and judge."""

    rollout: Fleet[RolloutActor]
    reward: Fleet[RewardActor]
    frozen: Fleet[FrozenActor] | None = None
    demonstrations: GivenDemonstrations | None = None
    """Those that the reward actors show the frozen LM, if they were drawn."""

    @property
    def all(self) -> list[Fleet[Any]]:
        """All fleets."""
        return [self.rollout, self.reward, *([self.frozen] if self.frozen else [])]

    def wait_ready(self) -> None:
        """Waits until all actors have set themselves up; raises as `Fleet.wait_ready` does."""
        if self.frozen is not None:
            self.frozen.wait_ready()
        self.rollout.wait_ready()
        self.reward.wait_ready(
            frozen_handles=self.frozen.handles if self.frozen else [],
            demonstrations=self.demonstrations,
        )


class Background(Protocol):
    """Other work that goes on while batches are sampled and judged."""

    def refs(self) -> list[Any]:
        """Object references that become ready when there is news of its calls."""

    def turn(self) -> None:
        """Handles the results of its calls that have arrived; never waits."""

    @property
    def frozen_seconds(self) -> float:
        """Seconds that the frozen LM's actors have worked for it so far."""

    def abandon(self) -> None:
        """Forgets what is not finished."""


class Pipeline:
    """The open batches, and the units of work that fill them.

    Use as a context manager: what is still open at the end is abandoned.
    """

    def __init__(
        self,
        run: Run,
        fleets: Fleets,
        learners: Learning,
        state: RunState,
        background: Background | None = None,
    ) -> None:
        """Begins after the last step of ``state``, with no batch open.

        Args:
            background: other work that is kept going, and abandoned with the batches.
        """
        self._run = run
        self._fleets = fleets
        self._learners = learners
        self._background = background
        self._stage = state.stage
        self._next = state.step
        self._questions = Questions(
            len(run.train), run.config.seed, run.config.refine, state.sampler
        )
        self._batches: dict[int, Batch] = {}
        self._trouble: UserError | None = None
        self._judge_seconds = 0.0

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        for fleet in self._fleets.all:
            fleet.abandon()
        if self._background is not None:
            self._background.abandon()

    @property
    def _sources(self) -> list[Source]:
        """Where news comes from."""
        background = [self._background] if self._background is not None else []
        return [*self._fleets.all, self._learners, *background]

    @property
    def frozen_seconds(self) -> float:
        """Seconds that the frozen LM's actors have worked so far, for all that it was asked."""
        other = self._background.frozen_seconds if self._background is not None else 0.0
        return self._judge_seconds + other

    def wants(self, version: int) -> bool:
        """Whether there are batches that the policy of this version is to sample."""
        return self._next < self._end(version)

    def sample(self, version: int, weights: WeightsRef) -> None:
        """Opens all batches that the policy of this version is to sample; does not wait."""
        while self._next < self._end(version):
            self._open(version, weights)
            self._next += 1

    def _end(self, version: int) -> int:
        refine = self._run.config.refine
        return min(version + refine.max_staleness + 1, refine.steps)

    def ready(self) -> int:
        """Number of batches that are judged and wait to be learnt."""
        return sum(batch.complete for batch in self._batches.values())

    def take(self, step: int) -> Batch:
        """Waits until the batch of a step is sampled and judged, and returns it.

        Raises:
            UserError: if too much of a batch failed, or the frozen LM's budget is spent.
            RuntimeError: if a rationale was sampled by a policy that is too old.
            LearnerLost: if a learner died meanwhile.
        """
        if self._trouble is not None:
            raise self._trouble
        batch = self._batches[step]
        self.work_off(lambda: batch.complete)
        while lost := self._hand_over(batch):
            for key in lost:
                self._sample_again(batch, key)
            self.work_off(lambda: batch.complete)
        batch.let_go()
        del self._batches[step]
        columns = batch.columns
        check_staleness(columns, step, self._run.config.refine.max_staleness)
        check_judged(columns, batch.failures)
        later = [batch.drawn, *(one.drawn for one in self._batches.values())]
        self._questions.close(batch.asked, batch.results, batch.unasked, later)
        batch.sampler = self._questions.state_after(batch.drawn)
        return batch

    def _hand_over(self, batch: Batch) -> list[str]:
        """Has the learners fetch a batch, and fetches its records; returns the units lost to them.

        Units are lost with the node that holds them.
        """
        pending = self._learners.fetch(batch.scored)
        records = fetch([batch.records_by_unit[key] for key in batch.keys])
        lost = self.work_until(pending) | {at for at, one in enumerate(records) if one is None}
        batch.records = b"".join(one for one in records if one is not None)
        return [batch.keys[at] for at in sorted(lost)]

    def work_until(self, pending: Awaited[_Result]) -> _Result:
        """Keeps sampling and judging until the learners have done a call; returns its result.

        A `UserError` of the other actors is raised by the next `take`, so that the learners' step
        is not lost.
        """
        while not pending.done():
            if self._trouble is None:
                try:
                    self._turn()
                except UserError as error:
                    self._trouble = error
            wait_for_news(*self._sources, pending)
        return pending.result()

    def _turn(self) -> None:
        """Handles the results that have arrived, and submits what follows from them."""
        self._learners.check()
        try:
            if self._fleets.frozen is not None:
                self._fleets.frozen.keep_up()  # its clients call its actors by themselves
            if self._background is not None:
                self._background.turn()
            self._fleets.rollout.turn()
            self._fleets.reward.turn()
        except (UnitLost, Unanswered):
            self._learners.probe()  # perhaps the weights are gone with the learner that held them
            raise

    def work_off(self, until: Callable[[], bool]) -> None:
        """Keeps the actors at work until a condition holds.

        Raises: as `take` does.
        """
        while not until():
            self._run.interruption.check()
            self._turn()
            if not until():
                wait_for_news(*self._sources)

    def _open(self, version: int, weights: WeightsRef) -> None:
        """Opens the next batch, and has its first questions sampled."""
        batch = Batch(
            step=self._next,
            version=version,
            weights=weights,
            filtered=self._run.config.refine.filter is not None,
            drawn=self._questions.draw(),
            losses=Losses(self._run.config.failures, 0, f"judgements of step {self._next + 1}"),
            opened=time.monotonic(),
        )
        self._batches[self._next] = batch
        self._ask(batch, batch.drawn.first)

    def _ask(self, batch: Batch, turns: list[Turn]) -> None:
        """Has further questions of a batch sampled."""
        config = self._run.config
        batch.losses.expect(len(turns) * config.refine.samples_per_prompt)
        for group in in_units(turns, config.actors.prompts_per_unit):
            key = f"step-{batch.step + 1}/{len(batch.keys)}"
            questions = Packed.of(tuple(self._run.train[turn.row].example for turn in group))
            batch.asked += group
            batch.keys.append(key)
            batch.units[key] = RolloutUnit(
                unit_id=key,
                questions=questions,
                samples=config.refine.samples_per_prompt,
                temperature=config.policy.temperature,
                max_new_tokens=config.policy.max_new_tokens,
                seed=config.seed,
                step=batch.step,
                policy_version=batch.version,
                weights=batch.weights,
            )
            self._sample(batch, key)

    def _sample(self, batch: Batch, key: str) -> None:
        then = partial(self._sampled, batch)
        self._fleets.rollout.submit_split(
            RolloutActor.sample_split, key, batch.units[key], then, kept=1
        )

    def _sample_again(self, batch: Batch, key: str) -> None:
        """Has a unit sampled once more whose rationales are lost; its seeds are the same.

        Raises:
            UnitLost: if they were lost ``actors.max_attempts`` times.
        """
        batch.forget_unit(key)
        times = batch.losses_by_unit[key]
        if times >= self._run.config.actors.max_attempts:
            raise UnitLost(
                f"the rationales of unit {key} were lost {times} times from the object store: see "
                "Ray's logs for why its nodes die"
            )
        say(f"the rationales of unit {key} were lost with a node; they are sampled again")
        self._sample(batch, key)

    def _sampled(self, batch: Batch, key: str, _: None, kept: tuple[Kept[Any], ...]) -> None:
        """Has a unit's rationales judged, while others are still being sampled."""
        batch.sampled_units.add(key)
        if len(batch.sampled_units) == len(batch.keys):
            batch.sampled = time.monotonic()
        questions, signal = batch.units[key].questions, self._run.config.refine.filter
        unit = KeptScoreUnit(key, questions, kept[0], signal)
        then = partial(self._judged, batch)
        self._fleets.reward.submit_split(RewardActor.score_split, key, unit, then, kept=2)

    def _judged(
        self, batch: Batch, key: str, judged: Tally | None, kept: tuple[Kept[Any], ...]
    ) -> None:
        if judged is None:
            self._sample_again(batch, key)
            return
        batch.judged_by_unit[key] = judged
        batch.scored_by_unit[key], batch.records_by_unit[key] = kept
        self._judge_seconds += judged.frozen_seconds
        self._run.spending.add(self._stage, judged.usage)
        self._run.tell_unmeasured(judged.unmeasured)
        batch.losses.add(judged.failures)
        if batch.complete:
            batch.judged = time.monotonic()
            self._refill(batch)

    def _refill(self, batch: Batch) -> None:
        """Has further questions asked in place of those that are left out, as far as there are.

        Only once all that were asked before are judged: which ones follow must not depend on which
        unit is done first.
        """
        lacking = len(batch.drawn.first) - batch.learnt
        if turns := batch.unasked[:lacking]:
            self._ask(batch, turns)
