"""The KL controller, by hand numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmcot.config import AdaptiveKl, FixedKl
from lmcot.learner.kl_control import KlController


def _adaptive(**values: float) -> AdaptiveKl:
    settings = AdaptiveKl(kind="adaptive", coefficient=0.5, target=6.0, horizon=100.0)
    return AdaptiveKl.model_validate({**settings.model_dump(), **values})


@pytest.mark.parametrize(
    ("kl", "rationales", "coefficient"),
    [
        (6.0, 10, 0.5),  # on target
        (6.6, 10, 0.505),  # 10% above, 10 of 100 rationales: times 1.01
        (5.4, 10, 0.495),
        (60.0, 10, 0.51),  # the error is clipped at 0.2
        (0.0, 10, 0.49),
        (-3.0, 10, 0.49),
        (60.0, 1000, 1.5),  # 1 + 0.2 * 10
    ],
)
def test_adaptive_update(kl: float, rationales: int, coefficient: float) -> None:
    """[14] value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon."""
    controller = KlController(_adaptive())
    controller.update(kl, rationales)
    assert controller.coefficient == pytest.approx(coefficient)


def test_updates_multiply() -> None:
    """[14] one update after another, each on the last coefficient."""
    controller = KlController(_adaptive())
    for kl in (60.0, 60.0, 0.0):
        controller.update(kl, 50)
    assert controller.coefficient == pytest.approx(0.5 * 1.1 * 1.1 * 0.9)


@given(st.floats(-1e6, 1e6), st.integers(501, 10**9))
def test_coefficient_stays_positive_beyond_five_horizons(kl: float, rationales: int) -> None:
    """[14] with n > 5 * horizon the unguarded factor would be negative."""
    controller = KlController(_adaptive())
    for _ in range(3):
        controller.update(kl, rationales)
        assert controller.coefficient > 0


@pytest.mark.parametrize("values", [{"target": 0.0}, {"horizon": 0.0}, {"target": -1.0}])
def test_target_and_horizon_are_positive(values: dict[str, Any]) -> None:
    """[14] target and horizon > 0."""
    with pytest.raises(ValidationError):
        _adaptive(**values)


def test_fixed_coefficient_never_moves() -> None:
    controller = KlController(FixedKl(kind="fixed", coefficient=0.05))
    controller.update(1e9, 10**6)
    assert controller.coefficient == 0.05


def test_state_survives_a_round_trip() -> None:
    """[14] the state survives a resume, through JSON, to the bit."""
    controller = KlController(_adaptive())
    controller.update(7.3, 37)
    restored = KlController(_adaptive())
    restored.restore(json.loads(json.dumps(controller.state())))
    for each in (controller, restored):
        each.update(2.9, 41)
    assert restored.coefficient == controller.coefficient != 0.5


def test_a_fixed_coefficient_is_that_of_the_present_settings() -> None:
    """A resume with another one uses it: a checkpoint's does not come back."""
    before = KlController(FixedKl(kind="fixed", coefficient=0.05))
    resumed = KlController(FixedKl(kind="fixed", coefficient=0.2))
    resumed.restore(before.state())
    assert resumed.coefficient == 0.2
