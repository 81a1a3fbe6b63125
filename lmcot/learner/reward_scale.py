"""Rewards divided by their standard deviation over the run so far."""

from __future__ import annotations

import math
from collections.abc import Sequence


class RewardScale:
    """Divides rewards by their running standard deviation; they keep their mean.

    The moments are Welford's, merged batch by batch (Chan et al. 1983).
    """

    def __init__(self) -> None:
        self._count = 0.0
        self._mean = 0.0
        self._squares = 0.0

    def scale(self, rewards: Sequence[float]) -> list[float]:
        """Adds a step's rewards to the statistics, and returns them scaled."""
        number = len(rewards)
        mean = math.fsum(rewards) / number
        squares = math.fsum((reward - mean) ** 2 for reward in rewards)
        gap, total = mean - self._mean, self._count + number
        self._squares += squares + gap**2 * self._count * number / total
        self._mean += gap * number / total
        self._count = total
        deviation = math.sqrt(self._squares / total)
        return [reward / deviation if deviation > 1e-8 else reward for reward in rewards]

    def state(self) -> dict[str, float]:
        """State that a resume needs."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def restore(self, state: dict[str, float]) -> None:
        """Restores a saved state."""
        self._count, self._mean = state["count"], state["mean"]
        self._squares = state["squares"]
