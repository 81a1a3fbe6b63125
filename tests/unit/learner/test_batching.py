"""How responses are cut into micro-batches and dealt out: nothing lost, nothing too large."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmcot.learner import batching
from lmcot.learner.batching import (
    BatchPlanner,
    Lengths,
    MicroBatch,
    TokenPair,
    plan_micro_batches,
    split_evenly,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Plan = list[list[MicroBatch]]


class Step(NamedTuple):
    """What a plan is made of."""

    lengths: list[Lengths]
    prompts: list[int]
    budget: int
    ranks: int
    share: bool
    apart: bool

    def plan(self) -> Plan:
        return plan_micro_batches(
            self.lengths, self.prompts, budget=self.budget, ranks=self.ranks,
            share=self.share, apart=self.apart,
        )  # fmt: skip

    def tokens(self, batch: MicroBatch) -> int:
        """Padded tokens of a micro-batch, written out."""
        prompts = [self.lengths[group[0]].prompt for group in batch.groups]
        responses = [sum(self.lengths[i].response for i in group) for group in batch.groups]
        if self.apart:
            return len(prompts) * (max(prompts) + max(responses))
        return len(prompts) * max(p + r for p, r in zip(prompts, responses, strict=True))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Up to 30 responses to up to 6 prompts, on up to 5 ranks."""
    prompt_lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    prompts = draw(st.lists(st.integers(0, len(prompt_lengths) - 1), min_size=1, max_size=30))
    lengths = [Lengths(prompt_lengths[p], draw(st.integers(1, 40))) for p in prompts]
    budget, ranks = draw(st.integers(1, 300)), draw(st.integers(1, 5))
    return Step(lengths, prompts, budget, ranks, draw(st.booleans()), draw(st.booleans()))


def _indices(plan: Plan, *, counted: bool) -> list[int]:
    return [i for rank in plan for batch in rank if batch.counted == counted for i in batch.indices]


def _groups(plan: Plan) -> list[list[tuple[tuple[int, ...], ...]]]:
    return [[batch.groups for batch in rank] for rank in plan]


def test_a_plan_by_hand() -> None:
    """Rows of 18, 12 and 5 tokens: what fits together, and what one rank gets."""
    # Prompt 0 has 6 tokens, prompt 1 has 10, prompt 2 has 4.
    lengths = [Lengths(6, 2), Lengths(10, 8), Lengths(6, 4), Lengths(4, 1)]
    prompts = [0, 1, 0, 2]
    # 18 + 12 would be padded to 36, with 5 left over; 12 + 5, padded to 24, leaves 18.
    assert _groups(plan_micro_batches(lengths, prompts, budget=36)) == [[((2, 0), (3,)), ((1,),)]]
    # At 54 all three fit at once; two ranks share the work in the same way.
    assert _groups(plan_micro_batches(lengths, prompts, budget=54)) == [[((1,), (2, 0), (3,))]]
    two = plan_micro_batches(lengths, prompts, budget=54, ranks=2)
    assert _groups(two) == [[((2, 0), (3,))], [((1,),)]]
    # At 11 the two responses to prompt 0 have a row each, and no two rows fit together.
    assert _groups(plan_micro_batches(lengths, prompts, budget=11)) == [
        [((1,),), ((2,),), ((0,),), ((3,),)]
    ]
    # Not shared, there are rows of 18, 10, 8 and 5: 18 and 3 x 10 rather than 36 and 16.
    apart = plan_micro_batches(lengths, prompts, budget=36, share=False)
    assert _groups(apart) == [[((2,), (0,), (3,)), ((1,),)]]


def test_an_encoders_prompts_are_padded_by_themselves() -> None:
    """[22] two rows of 101 tokens are 400 where the one's prompt and the other's response are
    long, and 202 where the prompt and its response are one row."""
    lengths, prompts = [Lengths(100, 1), Lengths(1, 100)], [0, 1]
    together = [[((0,), (1,))]]
    assert _groups(plan_micro_batches(lengths, prompts, budget=202)) == together
    assert len(plan_micro_batches(lengths, prompts, budget=399, apart=True)[0]) == 2
    # By the length of the prompt where the whole is equal: like goes with like.
    assert _groups(plan_micro_batches(lengths, prompts, budget=400, apart=True)) == [[((1,), (0,))]]


def test_a_rank_with_nothing_left_gets_a_filler() -> None:
    """[22] the shortest response again, which does not count."""
    lengths = [Lengths(5, 3), Lengths(5, 90), Lengths(5, 40)]
    first, second = plan_micro_batches(lengths, [0, 1, 2], budget=50, ranks=2)
    assert first == [MicroBatch(((1,),)), MicroBatch(((0,),), counted=False)]
    assert second == [MicroBatch(((2,),)), MicroBatch(((0,),))]
    alone = plan_micro_batches([Lengths(2, 2)], [0], budget=50, ranks=3)
    assert [[batch.counted for batch in rank] for rank in alone] == [[True], [False], [False]]


def test_nothing_to_plan() -> None:
    assert plan_micro_batches([], [], budget=8, ranks=2) == [[], []]


@given(steps())
def test_every_response_counts_exactly_once(step: Step) -> None:
    """[22] over all ranks; what is there for another time does not count."""
    plan = step.plan()
    assert sorted(_indices(plan, counted=True)) == list(range(len(step.lengths)))
    assert set(_indices(plan, counted=False)) <= set(range(len(step.lengths)))


@given(steps())
def test_every_rank_gets_as_many_micro_batches(step: Step) -> None:
    """[22] ZeRO stages 2 and 3 communicate in each: one rank with more would wait for ever."""
    plan = step.plan()
    assert len(plan) == step.ranks
    assert len({len(rank) for rank in plan}) == 1


@given(steps())
def test_the_budget_is_kept_unless_one_response_exceeds_it(step: Step) -> None:
    for rank in step.plan():
        for batch in rank:
            assert step.tokens(batch) <= step.budget or len(batch.indices) == 1


@given(steps())
def test_only_responses_to_one_prompt_share_a_row(step: Step) -> None:
    for rank in step.plan():
        for batch in rank:
            for group in batch.groups:
                assert len({step.prompts[index] for index in group}) == 1
                assert step.share or len(group) == 1


@given(steps(), st.integers(0, 9))
def test_prompts_share_a_row_where_there_is_room(step: Step, more: int) -> None:
    """With one rank and room for each prompt's responses, every prompt is read once."""
    longest = sum(lengths.response for lengths in step.lengths) + 40
    (plan,) = step._replace(share=True, budget=longest + more, ranks=1).plan()
    read = [step.prompts[group[0]] for batch in plan for group in batch.groups]
    assert sorted(read) == sorted(set(step.prompts))


@given(steps())
def test_fillers_are_for_want_of_responses_only(step: Step) -> None:
    """[22] where anything could still be divided, there is none; and never one for each rank."""
    plan = step.plan()
    fillers = _indices(plan, counted=False)
    if fillers:
        assert len(fillers) < step.ranks
        assert len(step.lengths) % step.ranks == step.ranks - len(fillers)
        assert all(len(batch.indices) == 1 for rank in plan for batch in rank)


@given(steps(), st.randoms(use_true_random=False))
def test_the_plan_is_a_function_of_the_lengths(step: Step, shuffler: random.Random) -> None:
    """[22] every rank computes the same one, whatever it calls the prompts."""
    names = list(range(100, 110))
    shuffler.shuffle(names)
    renamed = step._replace(prompts=[names[prompt] for prompt in step.prompts])
    assert renamed.plan() == step.plan() == step.plan()


def _rounds(step: Step) -> list[list[int]]:
    """Padded tokens that each rank has in each round."""
    ranks = [[step.tokens(batch) for batch in rank] for rank in step.plan()]
    return [list(costs) for costs in zip(*ranks, strict=True)]


@given(steps())
def test_the_longest_come_first(step: Step) -> None:
    """What does not fit into memory shows in the first round."""
    rounds = _rounds(step)
    for earlier, later in itertools.pairwise(rounds):
        assert min(earlier) >= max(later)


@given(steps())
@example(Step([Lengths(1, 98), Lengths(1, 9), Lengths(1, 9)], [0, 1, 2], 9, 2, False, False))
def test_ranks_wait_for_each_other_no_longer_than_for_one_micro_batch(step: Step) -> None:
    """The rounds are cut from one falling order: what the fastest rank waits in all of them
    together is at most the largest micro-batch less the smallest."""
    rounds = _rounds(step)
    costs = [cost for costs in rounds for cost in costs]
    waited = sum(max(costs) - min(costs) for costs in rounds)
    assert waited <= max(costs) - min(costs)
    totals = [sum(costs) for costs in zip(*rounds, strict=True)]
    assert max(totals) - min(totals) <= max(costs) - min(costs)


def _least_largest(step: Step) -> int:
    """Cost of the largest of the micro-batches that are cut in the best way.

    Over all cuts of the rows, in the planner's order, into the fewest micro-batches that keep
    the budget, rounded up to the ranks.
    """
    rows = [tuple(lengths) if step.apart else (sum(lengths),) for lengths in step.lengths]
    rows.sort(key=lambda row: (-sum(row), row))

    def cost(start: int, end: int) -> int:
        return (end - start) * sum(max(column) for column in zip(*rows[start:end], strict=True))

    @functools.cache
    def fewest(start: int) -> int:
        if start == len(rows):
            return 0
        ends = range(start + 1, len(rows) + 1)
        fitting = [end for end in ends if end == start + 1 or cost(start, end) <= step.budget]
        return 1 + min(fewest(end) for end in fitting)

    @functools.cache
    def best(start: int, parts: int) -> float:
        if start == len(rows):
            return 0
        if not parts:
            return float("inf")
        ends = range(start + 1, len(rows) + 1)
        return min(max(cost(start, end), best(end, parts - 1)) for end in ends)

    return int(best(0, -(-fewest(0) // step.ranks) * step.ranks))


@given(steps())
@settings(max_examples=60)
def test_no_cut_has_a_smaller_largest_micro_batch(step: Step) -> None:
    """Micro-batches are evened out: a last small one would waste a round. By brute force."""
    few = step._replace(lengths=step.lengths[:12], prompts=step.prompts[:12], share=False)
    largest = max(cost for costs in _rounds(few) for cost in costs)
    assert largest <= _least_largest(few)


def _pairs(step: Step) -> list[TokenPair]:
    return [([p + 1] * n, [50 + i] * m) for i, (p, (n, m)) in enumerate(_by_prompt(step))]


def _by_prompt(step: Step) -> list[tuple[int, Lengths]]:
    return list(zip(step.prompts, step.lengths, strict=True))


@given(steps())
def test_the_tensors_keep_the_budget(step: Step) -> None:
    """What really goes through the model, encoder and decoder together, padding included."""
    pairs = _pairs(step)
    planner = BatchPlanner(
        pad_id=0, start_id=0 if step.apart else None, budget=step.budget, share=step.share
    )
    for micro in planner.plan(pairs, range(len(pairs))):
        batch = planner.lay_out(pairs, micro)
        read = batch.ids.numel()
        if batch.encoder_ids is not None:
            read += batch.encoder_ids.numel()
        assert read <= step.budget or len(micro.indices) == 1
        targets = [token for index in micro.indices for token in pairs[index][1]]
        assert batch.targets.tolist() == targets
        assert step.share or not batch.shared


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_plans_its_own_share_of_a_minibatch(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """[22] a plan's indices are those of the pairs, and prompts are told apart by their ids."""
    pairs: list[TokenPair] = [
        ([7, 7], [1]), ([8, 8], [1, 2]), ([7, 7], [1, 2, 3]), ([9], [4]), ([8, 8], [5, 6]),
        ([7, 7], [9, 9]),
    ]  # fmt: skip
    minibatch = [5, 2, 1, 4]
    planner = BatchPlanner(pad_id=0, start_id=None, budget=8, share=True)
    monkeypatch.setattr(batching, "world_size", lambda: ranks)
    plans = []
    for rank in range(ranks):
        monkeypatch.setattr(batching, "rank", functools.partial(int, rank))
        plans.append(planner.plan(pairs, minibatch))
    assert sorted(_indices(plans, counted=True)) == sorted(minibatch)
    groups = {group for plan in plans for batch in plan for group in batch.groups}
    # Rows of 2 + 3 + 2 and 2 + 2 + 2 tokens; the third rank gets one of the former's halves.
    assert groups == ({(2, 5), (1, 4)} if ranks < 3 else {(2,), (5,), (1, 4)})


@given(st.lists(st.integers(), max_size=40), st.integers(1, 12))
def test_split_evenly_keeps_order_and_sizes(rows: Sequence[int], parts: int) -> None:
    result = split_evenly(rows, parts)
    assert [row for part in result for row in part] == rows
    assert len(result) == min(parts, len(rows))
    sizes = [len(part) for part in result]
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_split_evenly_by_hand() -> None:
    assert split_evenly([4, 2, 0, 1, 3], 2) == [[4, 2, 0], [1, 3]]
    assert split_evenly([1, 0], 3) == [[1], [0]]
