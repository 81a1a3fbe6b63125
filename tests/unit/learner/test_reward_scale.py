"""Rewards in units of their own spread: as if all of the run's were at hand."""

from __future__ import annotations

import json
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcot.learner.reward_scale import RewardScale

# Of a grid: what differs, differs by far more than the bound below which nothing is divided.
REWARDS = st.integers(-4000, 4000).map(lambda number: number / 40)
STEPS = st.lists(st.lists(REWARDS, min_size=1, max_size=8), min_size=1, max_size=6)


def test_two_steps_by_hand() -> None:
    """[12] rewards keep their mean: they are divided, not centred."""
    scale = RewardScale()
    # Deviation of 1 and 5: 2.
    assert scale.scale([1.0, 5.0]) == [0.5, 2.5]
    # Mean of 1, 5, 3, 7: 4; squares 9, 1, 1, 9; deviation sqrt(5).
    assert scale.scale([3.0, 7.0]) == pytest.approx([3 / 5**0.5, 7 / 5**0.5], rel=1e-15)


@given(STEPS)
def test_the_deviation_is_that_of_all_rewards_so_far(steps: list[list[float]]) -> None:
    """[12] against numpy over the concatenated history."""
    scale = RewardScale()
    for rewards, history in zip(steps, accumulate(steps), strict=True):
        deviation = np.std(history) if len(set(history)) > 1 else 1.0
        np.testing.assert_allclose(scale.scale(rewards), np.array(rewards) / deviation, rtol=1e-12)


def test_rewards_far_from_zero_lose_no_digits() -> None:
    """[12] sums of squares less squared sums would leave nothing of a spread of 1 at 1e9."""
    scale = RewardScale()
    for _ in range(50):
        found = scale.scale([1e9 - 1, 1e9 + 1])
    assert found == pytest.approx([1e9 - 1, 1e9 + 1], rel=1e-12)


def test_equal_rewards_stay_as_they_are() -> None:
    """[12] no spread yet, as after a first step of one reward: nothing to divide by."""
    scale = RewardScale()
    assert scale.scale([0.3]) == [0.3]
    assert scale.scale([0.3, 0.3]) == [0.3, 0.3]
    # Mean 0.55, squares 3 x 0.0625 and 0.5625: deviation sqrt(0.1875).
    assert scale.scale([1.3]) == pytest.approx([1.3 / 0.1875**0.5], rel=1e-12)


@given(STEPS, STEPS)
def test_a_resumed_run_goes_on_identically(
    before: list[list[float]], after: list[list[float]]
) -> None:
    """[12] running statistics survive a resume, by way of JSON, to the bit."""
    whole = RewardScale()
    for rewards in before:
        whole.scale(rewards)
    resumed = RewardScale()
    resumed.scale([17.0, -3.0])  # what it had is forgotten
    resumed.restore(json.loads(json.dumps(whole.state())))
    for rewards in after:
        assert resumed.scale(rewards) == whole.scale(rewards)
    assert resumed.state() == whole.state()
