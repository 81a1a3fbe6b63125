"""How certain figures are: bootstrap intervals (Efron 1979), and paired tests of two systems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_POWER = 0.8
"""Power of the test at the smallest difference that is called detectable."""
_ROUNDING = 1e-12
"""Means that differ by less count as equal."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The difference of two systems on the same questions, in the values' units."""

    n: int
    """Number of questions that both answered."""
    difference: float
    """The mean of first - second."""
    low: float
    high: float
    """The bootstrap interval of that mean."""
    p: float
    """Two-sided p value, by the paired bootstrap under the null."""
    detectable: float | None
    """The smallest true difference that such a sample shows with 80% power; None if all
    differences are equal, so that their spread is unknown."""


def bootstrap_intervals(
    metrics: Mapping[str, Sequence[float]], *, samples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the means, in the units of the values, by metric name.

    Questions are resampled with replacement, all metrics of a question together. The draws
    depend on the seed and the number of questions only.

    Raises:
        ValueError: if the metrics are empty or differ in length, or a value is not finite.
    """
    if len({len(values) for values in metrics.values()}) != 1:
        raise ValueError("every metric needs the same number of values")
    values = np.array(list(metrics.values()), dtype=np.float64)
    low, high = _percentiles(_resampled_means(values, samples, seed), confidence)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(metrics)}


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> PairedDifference:
    """Compares two systems by their scores on the same questions, in the same order.

    With d = first - second and m its mean: the interval is that of `bootstrap_intervals` for d.
    The p value comes from the same resamples, shifted to a mean of 0, which is the null: the share
    of their means that lie at least as far from 0 as m, (1 + those) / (1 + samples). Detectable at
    80% power, by the normal approximation: (z(1 - a/2) + z(0.8)) s / sqrt(n), where s is the
    standard deviation of d and a = 1 - confidence.

    Raises:
        ValueError: if the scores are empty or differ in number, or a score is not finite.
    """
    if len(first) != len(second):
        raise ValueError("a paired comparison needs the same number of values on both sides")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    means = _resampled_means(differences[np.newaxis], samples, seed)[:, 0]
    mean = float(differences.mean())
    low, high = _percentiles(means, confidence)
    further = np.count_nonzero(np.abs(means - mean) >= abs(mean) - _ROUNDING)
    return PairedDifference(
        n=len(differences),
        difference=mean,
        low=float(low),
        high=float(high),
        p=float(1 + further) / (1 + samples),
        detectable=_detectable(differences, confidence),
    )


def mcnemar(first_right: Sequence[float], second_right: Sequence[float]) -> float:
    """McNemar's exact test: the two-sided p value that both are right equally often.

    Of the questions that only one of the two got right, each falls to either side with a chance of
    one half under the null; p is twice the smaller binomial tail, at most 1.

    Args:
        first_right, second_right: whether each question was answered rightly (1 or True).

    Raises:
        ValueError: if they are empty or differ in number.
    """
    if not first_right or len(first_right) != len(second_right):
        raise ValueError("McNemar's test needs the same number of answers on both sides")
    pairs = [(bool(a), bool(b)) for a, b in zip(first_right, second_right, strict=True)]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def _resampled_means(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Means of (metrics, questions) over resampled questions: (samples, metrics)."""
    n = values.shape[1]
    if n == 0:
        raise ValueError("there are no values to resample")
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    rng = np.random.default_rng(seed)
    return np.stack([values[:, rng.integers(n, size=n)].mean(axis=1) for _ in range(samples)])


def _percentiles(means: NDArray[np.float64], confidence: float) -> NDArray[np.float64]:
    """The ends of the interval: (2,) or (2, metrics)."""
    tail = 50 * (1 - confidence)
    return np.asarray(np.percentile(means, [tail, 100 - tail], axis=0))


def _detectable(differences: NDArray[np.float64], confidence: float) -> float | None:
    n = len(differences)
    spread = float(differences.std(ddof=1)) if n > 1 else 0.0
    if spread < _ROUNDING:
        return None
    z = NormalDist().inv_cdf
    return (z(1 - (1 - confidence) / 2) + z(_POWER)) * spread / math.sqrt(n)
