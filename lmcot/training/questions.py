"""Which questions each step asks, and which further ones it may ask in place of others.

A step draws its further questions together with its first ones, and what it did not ask of them is
given back when the step is learnt. So neither the speed nor the number of actors decides what a
step asks, also where several steps are sampled at the same time, and each question has one turn in
every epoch.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcot.config import Config, RefineSettings
from lmcot.data.sampler import PromptSampler
from lmcot.errors import UserError
from lmcot.records import GroupResult
from lmcot.training.curriculum import SOLVED, Curriculum, Turn


@dataclass(slots=True)
class Drawn:
    """The questions of one step."""

    first: list[Turn]
    """Those that it asks in any case."""
    further: list[Turn]
    """Those that it may ask in place of others, in this order."""
    state: dict[str, Any]
    """What the next step draws from: the sampler's state, and the turns that were given back."""
    metrics: dict[str, float]
    """What the curriculum did; empty without one."""


class Questions:
    """Draws the questions of one step after the other."""

    def __init__(
        self, count: int, seed: int, settings: RefineSettings, state: Mapping[str, Any]
    ) -> None:
        """Resumes from a state of `state_after`, or of a new `PromptSampler`.

        Raises:
            UserError: if the state is not of these questions and this seed, or there are too few
                questions to choose from.
        """
        check_enough(count, settings)
        self._count = count
        self._step = settings.prompts_per_step
        signal = settings.filter
        self._further = round(signal.refill * self._step) if signal is not None else 0
        self._sampler = PromptSampler(count, seed)
        self._sampler.restore(dict(state))
        self._returned = deque(Turn(*turn) for turn in state.get("returned", ()))
        chosen = settings.curriculum
        self._curriculum = Curriculum(chosen, state) if chosen is not None else None
        self._chooses = _chooses(settings)

    def draw(self) -> Drawn:
        """Draws for the next step.

        With a filter or a curriculum no question comes twice in a step: its second turn, if an
        epoch begins within the step, is given back for the next one.
        """
        if not self._chooses:
            turns = [self._next() for _ in range(self._step)]
            return Drawn(turns, [], self._sampler.state(), {})
        awake, woken = self._awake()
        wanted = min(self._step + self._further, awake)
        found: dict[int, Turn] = {}
        again: list[Turn] = []
        passed = 0
        while len(found) < wanted:
            turn = self._next()
            if self._curriculum is not None and self._curriculum.rests(turn):
                passed += 1
            elif turn.row in found:
                again.append(turn)
            else:
                found[turn.row] = turn
        self._returned.extendleft(reversed(again))
        turns = list(found.values())
        return Drawn(
            turns[: self._step],
            turns[self._step :],
            {**self._sampler.state(), "returned": list(self._returned)},
            self._metrics(passed, woken),
        )

    def close(
        self,
        asked: Sequence[Turn],
        results: Sequence[GroupResult],
        unasked: Sequence[Turn],
        drawn: Iterable[Drawn],
    ) -> None:
        """Notes what a step's questions came to, and gives back what it did not ask.

        Args:
            results: of the questions that were asked.
            drawn: what that step drew, and all steps that have drawn after it: for a resume after
                one of them the turns are there again, too.
        """
        if self._curriculum is not None:
            for turn, result in zip(asked, results, strict=True):
                self._curriculum.note(turn, result)
        self._returned.extend(unasked)
        if unasked:
            for one in drawn:
                one.state["returned"] += unasked

    def state_after(self, drawn: Drawn) -> dict[str, Any]:
        """State for a resume after a step that was closed, as plain JSON types."""
        curriculum = self._curriculum.state() if self._curriculum is not None else {}
        return copy.deepcopy({**drawn.state, **curriculum})

    def _next(self) -> Turn:
        if self._returned:
            return self._returned.popleft()
        epoch = self._sampler.epoch
        (row,) = self._sampler.next(1)
        return Turn(row, epoch)

    def _awake(self) -> tuple[int, int]:
        """The number of questions that are awake, and of those that were woken to be enough."""
        if self._curriculum is None:
            return self._count, 0
        resting = self._curriculum.resting(self._sampler.epoch)
        lacking = max(0, self._step - (self._count - len(resting)))
        for row in resting[:lacking]:
            self._curriculum.wake(row)
        return self._count - len(resting) + lacking, lacking

    def _metrics(self, passed: int, woken: int) -> dict[str, float]:
        if self._curriculum is None:
            return {}
        resting = self._curriculum.resting(self._sampler.epoch)
        solved = sum(self._curriculum.has_come_to_rest(row, SOLVED) for row in resting)
        return {
            "curriculum/solved": float(solved),
            "curriculum/unsolved": float(len(resting) - solved),
            "curriculum/passed": float(passed),
            "curriculum/woken": float(woken),
        }


def rows_of_steps(count: int, config: Config) -> range | set[int]:
    """The training questions that the steps may ask: all, if what they ask depends on the results.

    Args:
        count: number of training questions.
    """
    settings = config.refine
    if _chooses(settings):
        return range(count)
    drawn = min(settings.steps * settings.prompts_per_step, count)
    return set(PromptSampler(count, config.seed).next(drawn))


def check_enough(count: int, settings: RefineSettings) -> None:
    """Checks that a step's questions can be chosen from the training questions.

    Raises:
        UserError: if there are fewer than a step asks.
    """
    if _chooses(settings) and count < settings.prompts_per_step:
        raise UserError(
            f"refine.prompts_per_step is {settings.prompts_per_step}, but there are only {count} "
            "training questions, and with refine.filter or refine.curriculum no step asks a "
            "question twice: lower it, or give more questions"
        )


def _chooses(settings: RefineSettings) -> bool:
    return settings.filter is not None or settings.curriculum is not None
