"""How strongly the policy is held to its reference: the coefficient of the KL penalty."""

from __future__ import annotations

from lmcot.config import AdaptiveKl, FixedKl

SMALLEST_FACTOR = 0.1
"""With more than five horizons in one update the factor of Ziegler et al. would turn negative."""


class KlController:
    """Gives the coefficient and, where it is adaptive, steers it.

    Ziegler et al. 2019, section 2.2: ``value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n /
    horizon``. The factor is kept positive.
    """

    def __init__(self, settings: FixedKl | AdaptiveKl) -> None:
        self._settings = settings
        self.coefficient = settings.coefficient

    def update(self, kl: float, rationales: int) -> None:
        """Steers by the mean KL per rationale (nats) over so many rationales."""
        if isinstance(self._settings, FixedKl):
            return
        error = min(max(kl / self._settings.target - 1, -0.2), 0.2)
        factor = 1 + error * rationales / self._settings.horizon
        self.coefficient *= max(factor, SMALLEST_FACTOR)

    def state(self) -> dict[str, float]:
        """What a resume needs."""
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, float]) -> None:
        """Takes up a saved state; a fixed coefficient stays as the settings have it now."""
        if isinstance(self._settings, AdaptiveKl):
            self.coefficient = state["coefficient"]
