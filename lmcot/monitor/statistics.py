"""Confidence intervals by the bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def bootstrap_intervals(
    metrics: Mapping[str, Sequence[float]], *, samples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the means, in the units of the values, by metric name.

    Questions are resampled with replacement, all metrics of a question together. The draws
    depend on the seed and the number of questions only.

    Raises:
        ValueError: if the metrics are empty or differ in length.
    """
    if len({len(values) for values in metrics.values()}) != 1:
        raise ValueError("every metric needs the same number of values")
    values = np.array(list(metrics.values()), dtype=np.float64)
    n = values.shape[1]
    if n == 0:
        raise ValueError("there are no values to resample")
    rng = np.random.default_rng(seed)
    means = np.stack([values[:, rng.integers(n, size=n)].mean(axis=1) for _ in range(samples)])
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(metrics)}
