"""Which questions each step asks: in their order, each turn once, whatever happens in between."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcot.config import CurriculumSettings, Grpo, RefineSettings, SignalFilter
from lmcot.data.sampler import PromptSampler
from lmcot.errors import UserError
from lmcot.records import GroupResult
from lmcot.training.curriculum import Turn
from lmcot.training.questions import Drawn, Questions, check_enough

SEED = 3
RIGHT, MIXED, WRONG = GroupResult(4, 4, 4, "right"), GroupResult(4, 4, 2), GroupResult(4, 4, 0)
UNJUDGED = GroupResult(4, 0, 0, "few")
Answer = Callable[[Turn, int], GroupResult]
"""What a question comes to in a step."""


def refine(step: int, **parts: Any) -> RefineSettings:
    return RefineSettings(prompts_per_step=step, advantage=Grpo(kind="grpo"), **parts)


def ask(drawn: Drawn, answer: Answer, number: int) -> tuple[list[Turn], list[GroupResult]]:
    """What the pipeline does with the questions of a step: all that is lacking, time and again."""
    left = [*drawn.first, *drawn.further]
    asked, results = [], []
    lacking = len(drawn.first)
    while turns := left[:lacking]:
        left = left[lacking:]
        asked += turns
        results += [answer(turn, number) for turn in turns]
        lacking = len(drawn.first) - sum(not one.left_out for one in results)
    return asked, results


class Run:
    """Steps of which ``staleness`` + 1 are drawn ahead, and a resume after any of them."""

    def __init__(self, count: int, chosen: RefineSettings, answer: Answer, staleness: int = 0):
        self.count, self.chosen, self.answer, self.staleness = count, chosen, answer, staleness
        self.asked: list[list[Turn]] = []
        self.drawn: list[Drawn] = []
        self.states: list[dict[str, Any]] = []
        self.open: list[Drawn] = []
        self.resume(PromptSampler(count, SEED).state())

    def resume(self, state: dict[str, Any]) -> None:
        """Begins after the steps that were taken, from a state that went through a file."""
        state = json.loads(json.dumps(state))
        self.questions = Questions(self.count, SEED, self.chosen, state)
        self.open = []

    def take(self, steps: int) -> None:
        for _ in range(steps):
            while len(self.open) <= self.staleness:
                self.open.append(self.questions.draw())
            drawn = self.open[0]
            asked, results = ask(drawn, self.answer, len(self.asked))
            unasked = [*drawn.first, *drawn.further][len(asked) :]
            self.questions.close(asked, results, unasked, self.open)
            del self.open[0]
            self.drawn.append(drawn)
            self.asked.append(asked)
            self.states.append(self.questions.state_after(drawn))


def by_chance(seed: int, share: float = 0.5) -> Answer:
    """Some questions are left out, some of them right and some wrong; the same in each run."""

    def answer(turn: Turn, number: int) -> GroupResult:
        drawn = PromptSampler(100, seed * 7919 + turn.row * 31 + number).next(1)[0] / 100
        if drawn >= share:
            return MIXED
        return RIGHT if drawn < share / 2 else GroupResult(4, 4, 0, "wrong")

    return answer


sizes = st.integers(1, 6).flatmap(lambda step: st.tuples(st.just(step), st.integers(step, 20)))
refills = st.sampled_from([0.0, 0.3, 1.0, 3.0])
rests = st.none() | st.builds(
    CurriculumSettings,
    solved=st.integers(1, 2),
    unsolved=st.none() | st.integers(1, 3),
    rest=st.integers(1, 3),
)
seeds = st.integers(0, 1000)


@given(sizes, refills, seeds, st.integers(0, 3))
def test_every_turn_of_an_epoch_is_asked_once_or_still_to_come(
    size: tuple[int, int], refill: float, seed: int, staleness: int
) -> None:
    """Though steps that are open at the same time hold further questions in reserve."""
    step, count = size
    run = Run(count, refine(step, filter=SignalFilter(refill=refill)), by_chance(seed), staleness)
    run.take(12)
    asked = [turn for turns in run.asked for turn in turns]
    assert len(set(asked)) == len(asked), "no turn twice"
    state = run.states[-1]
    to_come = {Turn(*turn) for turn in state["returned"]}
    assert not to_come & set(asked)
    open_now = {turn for one in run.open for turn in (*one.first, *one.further)}
    for epoch in range(state["epoch"]):
        turns = {turn.row for turn in {*asked, *to_come, *open_now} if turn.epoch == epoch}
        assert turns == set(range(count))


@given(sizes, refills, rests, seeds)
def test_a_step_asks_no_question_twice_and_no_more_than_its_bound(
    size: tuple[int, int], refill: float, rest: CurriculumSettings | None, seed: int
) -> None:
    step, count = size
    chosen = refine(step, filter=SignalFilter(refill=refill), curriculum=rest)
    run = Run(count, chosen, by_chance(seed))
    run.take(12)
    for drawn, asked in zip(run.drawn, run.asked, strict=True):
        rows = [turn.row for turn in (*drawn.first, *drawn.further)]
        assert len(set(rows)) == len(rows)
        assert len(drawn.first) == step <= len(asked) <= step + round(refill * step)
        assert asked == [*drawn.first, *drawn.further][: len(asked)]


@given(sizes, refills, rests, seeds, st.integers(1, 11))
@settings(deadline=None)
def test_a_resume_asks_what_an_undisturbed_run_asks(
    size: tuple[int, int], refill: float, rest: CurriculumSettings | None, seed: int, at: int
) -> None:
    step, count = size
    chosen = refine(step, filter=SignalFilter(refill=refill), curriculum=rest)
    whole, resumed = (Run(count, chosen, by_chance(seed)) for _ in range(2))
    whole.take(12)
    resumed.take(at)
    state = copy.deepcopy(resumed.states[-1])
    resumed.questions.draw()  # begun when it was killed
    resumed.resume(state)
    resumed.take(12 - at)
    assert resumed.asked == whole.asked
    assert resumed.states == whole.states


@given(sizes, refills, seeds, st.integers(1, 3), st.integers(1, 11))
def test_a_resume_of_an_asynchronous_run_loses_and_doubles_no_turn(
    size: tuple[int, int], refill: float, seed: int, staleness: int, at: int
) -> None:
    step, count = size
    run = Run(count, refine(step, filter=SignalFilter(refill=refill)), by_chance(seed), staleness)
    run.take(at)
    run.resume(run.states[-1])
    run.take(12 - at)
    asked = [turn for turns in run.asked for turn in turns]
    assert len(set(asked)) == len(asked)
    left = {turn for one in run.open for turn in (*one.first, *one.further)}
    left |= {Turn(*turn) for turn in run.states[-1]["returned"]}
    for epoch in range(run.states[-1]["epoch"]):
        rows = {turn.row for turn in {*asked, *left} if turn.epoch == epoch}
        assert rows == set(range(count))


@given(sizes, st.integers(0, 3))
def test_without_a_choice_the_order_is_the_samplers(size: tuple[int, int], staleness: int) -> None:
    step, count = size
    run = Run(count, refine(step), by_chance(0, share=0.0), staleness)
    run.take(8)
    rows = [turn.row for turns in run.asked for turn in turns]
    assert rows == PromptSampler(count, SEED).next(8 * step)
    sampler = PromptSampler(count, SEED)
    for state in run.states:
        sampler.next(step)
        assert state == sampler.state(), "as in checkpoints of before"


def test_a_filter_that_leaves_nothing_out_keeps_the_order() -> None:
    run = Run(24, refine(4, filter=SignalFilter()), by_chance(0, share=0.0))
    run.take(6)
    rows = [turn.row for turns in run.asked for turn in turns]
    assert rows == PromptSampler(24, SEED).next(24)


def tried(outcomes: dict[int, str], **rest: Any) -> tuple[Run, Callable[[int], list[int]]]:
    """A run of steps of 2 of 6 questions; and a function that gives the rows of an epoch.

    Args:
        outcomes: by row, what its tries come to, one letter each; other questions are mixed.
    """
    tries: Counter[int] = Counter()

    def answer(turn: Turn, number: int) -> GroupResult:
        letters = outcomes.get(turn.row, "m")
        letter = letters[min(tries[turn.row], len(letters) - 1)]
        tries[turn.row] += 1
        return {"s": RIGHT, "m": MIXED, "u": WRONG, "-": UNJUDGED}[letter]

    run = Run(6, refine(2, curriculum=CurriculumSettings(**rest)), answer)

    def rows(epoch: int) -> list[int]:
        asked = (turn for turns in run.asked for turn in turns)
        return sorted(turn.row for turn in asked if turn.epoch == epoch)

    return run, rows


def test_a_question_rests_after_so_many_solved_tries_and_is_tried_again() -> None:
    run, rows = tried({1: "s", 4: "sm"}, solved=2, unsolved=None, rest=2)
    run.take(30)
    everyone, others = [0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5]
    assert [rows(epoch) for epoch in range(8)] == [
        everyone, everyone, others, others, everyone, others, others, everyone
    ]  # fmt: skip
    assert run.drawn[6].metrics["curriculum/solved"] == 1
    assert run.drawn[6].metrics["curriculum/unsolved"] == 0
    passed = sum(one.metrics["curriculum/passed"] for one in run.drawn[:22])
    assert passed == 4, "one turn in each epoch of a rest"


def test_a_question_that_is_never_solved_rests_and_one_that_could_not_be_judged_does_not() -> None:
    run, rows = tried({0: "u", 3: "-", 5: "um"}, solved=None, unsolved=2, rest=1)
    run.take(20)
    everyone, others = [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]
    assert [rows(epoch) for epoch in range(5)] == [everyone, everyone, others, everyone, others]
    assert run.drawn[6].metrics["curriculum/unsolved"] == 1


def test_a_pool_that_would_run_empty_wakes_whose_rest_ends_first() -> None:
    run, _ = tried(dict.fromkeys(range(6), "s"), solved=1, unsolved=1, rest=3)
    run.take(12)
    assert [len(set(asked)) for asked in run.asked] == [2] * 12
    metrics = [one.metrics for one in run.drawn]
    assert [one["curriculum/woken"] for one in metrics] == [0, 0, 0, *[2] * 9]
    assert metrics[5]["curriculum/solved"] == 4, "those that it asks were woken"
    first = [{turn.row for turn in asked} for asked in run.asked[:3]]
    again = [{turn.row for turn in asked} for asked in run.asked[3:6]]
    assert set.union(*again) == set.union(*first) == set(range(6)), "none is woken twice before"


def test_too_few_questions_are_refused() -> None:
    few = "prompts_per_step is 4, but there are only 3 training questions"
    check_enough(3, refine(4))
    for chosen in (refine(4, filter=SignalFilter()), refine(4, curriculum=CurriculumSettings())):
        check_enough(4, chosen)
        with pytest.raises(UserError, match=few):
            check_enough(3, chosen)
        with pytest.raises(UserError, match=few):
            Questions(3, SEED, chosen, PromptSampler(3, SEED).state())
