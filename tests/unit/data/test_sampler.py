from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcot.data import PromptSampler
from lmcot.errors import UserError

counts = st.integers(1, 40)
seeds = st.integers(0, 2**40)
draws = st.lists(st.integers(0, 25), max_size=12)


@given(counts, seeds, draws)
def test_every_epoch_is_a_permutation(count: int, seed: int, sizes: list[int]) -> None:
    sampler = PromptSampler(count, seed)
    drawn = [index for size in sizes for index in sampler.next(size)]
    assert len(drawn) == sum(sizes)
    for start in range(0, len(drawn), count):
        epoch = drawn[start : start + count]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(count))


@given(counts, seeds, draws, draws)
def test_a_restored_sampler_goes_on_the_same(
    count: int, seed: int, before: list[int], after: list[int]
) -> None:
    sampler = PromptSampler(count, seed)
    for size in before:
        sampler.next(size)
    restored = PromptSampler(count, seed)
    restored.restore(sampler.state())
    assert [restored.next(n) for n in after] == [sampler.next(n) for n in after]
    assert restored.state() == sampler.state()


@given(counts, seeds, draws)
def test_the_sequence_does_not_depend_on_the_sizes_drawn(
    count: int, seed: int, sizes: list[int]
) -> None:
    parts = PromptSampler(count, seed)
    drawn = [index for size in sizes for index in parts.next(size)]
    assert drawn == PromptSampler(count, seed).next(sum(sizes))


def test_seeds_and_epochs_differ() -> None:
    first = PromptSampler(50, seed=0).next(100)
    assert first[:50] != first[50:]
    assert first[:50] != PromptSampler(50, seed=1).next(50)


def test_the_order_is_pinned() -> None:
    """A run saved by one release resumes with another: the order may not change."""
    assert PromptSampler(8, seed=0).next(10) == [0, 2, 1, 4, 6, 7, 3, 5, 6, 1]


def test_state_is_plain_numbers() -> None:
    sampler = PromptSampler(4, seed=9)
    sampler.next(6)
    assert sampler.state() == {"count": 4, "seed": 9, "epoch": 1, "position": 2}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": 5}, "the saved sampler has count 5, but this run has 4"),
        ({"seed": 1}, "the saved sampler has seed 1, but this run has 9"),
        ({"epoch": -1}, "epoch -1 and position 0 are not possible"),
        ({"position": 5}, "epoch 0 and position 5 are not possible"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, int], sentence: str) -> None:
    sampler = PromptSampler(4, seed=9)
    with pytest.raises(UserError, match=sentence):
        sampler.restore({**sampler.state(), **change})
    with pytest.raises(UserError, match="the saved sampler has count None"):
        sampler.restore({})


def test_a_sampler_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        PromptSampler(0, seed=0)
