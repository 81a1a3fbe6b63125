"""Paired tests, by hand."""

from __future__ import annotations

import math

import pytest

from lmcot.evaluation.statistics import bootstrap_intervals, mcnemar, paired_difference


def test_two_pairs_can_be_worked_out_by_hand() -> None:
    # d = 1, 0; m = 0.5. A resample's mean less m is -0.5, 0, 0.5 with chances 1/4, 1/2, 1/4, so
    # half lie as far out as m. s = sqrt(0.5); (1.281552 + 0.841621) * s / sqrt(2) = 1.061587.
    found = paired_difference([1.0, 0.5], [0.0, 0.5], samples=4000, confidence=0.8, seed=1)
    assert (found.n, found.difference, found.low, found.high) == (2, 0.5, 0.0, 1.0)
    assert found.p == pytest.approx(0.5, abs=0.03)
    assert found.detectable == pytest.approx(1.061587, abs=1e-5)


def test_many_pairs_agree_with_the_normal_test() -> None:
    # 60 won, 40 lost, 300 equal: m = 0.05, s = 0.49809, z = 0.05 / (s / 20) = 2.0077, p = 0.0447;
    # detectable: (1.959964 + 0.841621) * s / 20 = 0.069772.
    first = [1.0] * 60 + [0.0] * 340
    second = [0.0] * 60 + [1.0] * 40 + [0.0] * 300
    found = paired_difference(first, second, samples=8000, confidence=0.95, seed=3)
    assert found.difference == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05 - 1.96 * 0.0249, abs=0.006)
    assert found.high == pytest.approx(0.05 + 1.96 * 0.0249, abs=0.006)
    assert found.p == pytest.approx(0.0447, abs=0.012)
    assert found.detectable == pytest.approx(0.069772, abs=1e-5)


def test_the_other_way_round_changes_the_sign_only() -> None:
    first, second = [1.0, 0.0, 1.0, 0.3], [0.0, 0.0, 1.0, 0.5]
    one = paired_difference(first, second, samples=300, confidence=0.9, seed=0)
    other = paired_difference(second, first, samples=300, confidence=0.9, seed=0)
    assert (other.difference, other.p) == (-one.difference, one.p)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low))


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_differences_that_do_not_vary_say_nothing_of_what_is_detectable(constant: float) -> None:
    found = paired_difference([constant] * 3, [0.0] * 3, samples=99, confidence=0.9, seed=0)
    assert found.detectable is None
    assert (found.low, found.high) == (constant, constant)
    assert found.p == (0.01 if constant else 1.0)


def test_mcnemar_counts_the_questions_that_only_one_got_right() -> None:
    # 1 against 5: 2 * (1 + 6) / 64 = 0.21875; 0 against 5: 2 / 32; 3 against 3: twice the tail
    # passes 1.
    assert mcnemar([1, 0, 0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0]) == 0.21875
    assert mcnemar([0] * 5, [1] * 5) == mcnemar([1] * 5, [0] * 5) == 0.0625
    assert mcnemar([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]) == 1.0
    assert mcnemar([1, 0], [1, 0]) == 1.0
    assert 0 < mcnemar([1] * 1000 + [0] * 700, [0] * 1000 + [1] * 700) < 1e-12


def test_what_cannot_be_compared_is_refused() -> None:
    for first, second in (([], []), ([1.0], [1.0, 0.0]), ([math.nan], [0.0])):
        with pytest.raises(ValueError, match="value"):
            paired_difference(first, second, samples=9, confidence=0.9, seed=0)
    for right in ([], [True, False]):
        with pytest.raises(ValueError, match="same number"):
            mcnemar(right, [True])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_intervals({"em": [math.inf]}, samples=9, confidence=0.9, seed=0)
