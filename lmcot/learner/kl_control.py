"""How strongly the policy is held to its reference: the coefficient of the KL penalty."""

from __future__ import annotations

from lmcot.config import AdaptiveKl, FixedKl

SMALLEST_FACTOR = 0.1
"""With more than five horizons in one update the factor of Ziegler et al. would turn negative."""


class KlController:
    """Holds the coefficient and, if it is adaptive, adjusts it.

    Ziegler et al. 2019, section 2.2: ``value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n /
    horizon``. The factor is kept positive.
    """

    def __init__(self, settings: FixedKl | AdaptiveKl) -> None:
        self._settings = settings
        self.coefficient = settings.coefficient

    def update(self, kl: float, rationales: int) -> None:
        """Adjusts the coefficient by the mean KL per rationale (nats) of this many rationales."""
        if isinstance(self._settings, FixedKl):
            return
        error = min(max(kl / self._settings.target - 1, -0.2), 0.2)
        factor = 1 + error * rationales / self._settings.horizon
        self.coefficient *= max(factor, SMALLEST_FACTOR)

    def state(self) -> dict[str, float]:
        """State that a resume needs."""
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, float]) -> None:
        """Takes up a saved state; a fixed coefficient stays as the settings have it now."""
        if isinstance(self._settings, AdaptiveKl):
            self.coefficient = state["coefficient"]
