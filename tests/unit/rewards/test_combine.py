"""From components to the scalar reward, and what is taken from it."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from lmcot.config import CustomReward, GuidanceRewards, Penalties
from lmcot.records import Judgement, Rollout
from lmcot.rewards.combine import scalar_reward, taken_off


def rollout(tokens: int, finish: Literal["eos", "length"] = "eos") -> Rollout:
    return Rollout("u", "q", 0, (1,), (2,) * tokens, (-0.5,) * tokens, finish, "text", 0)


def test_without_settings_nothing_is_taken() -> None:
    assert taken_off(rollout(10, "length"), Penalties(), 10) == {}


def test_the_missing_end_penalty_is_for_cut_rationales_only() -> None:
    """[7] a rationale cut at the length limit is penalised by setting, one that ended is not."""
    settings = Penalties(missing_end=0.25)
    assert taken_off(rollout(10, "length"), settings, 10) == {"penalty/missing_end": 0.25}
    assert taken_off(rollout(10, "eos"), settings, 10) == {"penalty/missing_end": 0.0}


@pytest.mark.parametrize(
    ("tokens", "taken"), [(0, 0), (1, 0), (8, 0), (9, 0.25), (11, 0.75), (12, 1), (13, 1)]
)
def test_the_length_penalty_rises_linearly_to_the_limit(tokens: int, taken: float) -> None:
    """DAPO's eq. 13 with L_max 12 and L_cache 4; it is the same whether the rationale ended."""
    settings = Penalties(length=0.5, length_free=2 / 3)
    for one in (rollout(tokens, "eos"), rollout(tokens, "length")):
        assert taken_off(one, settings, 12) == {"penalty/length": pytest.approx(0.5 * taken)}


def test_a_rationale_may_pay_from_its_first_token_on() -> None:
    settings = Penalties(length=1.0, length_free=0.0)
    assert taken_off(rollout(3), settings, 12)["penalty/length"] == 0.25


def test_every_component_weighs_what_the_settings_say() -> None:
    rewards = GuidanceRewards(
        em_weight=1.0,
        f1_weight=0.0,
        likelihood_gain_weight=2.0,
        custom="mine:reward",
        custom_weight=0.5,
        aspects={},
    )
    judgement = Judgement(
        {"em": 1.0, "f1": 1.0, "inclusion": 1.0, "likelihood_gain": -0.25, "custom": 3.0}
    )
    assert scalar_reward(judgement, rewards) == 1 - 0.5 + 1.5


def test_custom_rewards_have_a_weight_each() -> None:
    custom = {
        "short": CustomReward(function="mine:short", weight=0.5),
        "logged": CustomReward(function="mine:logged", weight=0.0),
    }
    rewards = GuidanceRewards(em_weight=0.0, f1_weight=0.0, custom=custom, aspects={})
    judgement = Judgement({"em": 1.0, "f1": 1.0, "custom/short": 3.0, "custom/logged": 7.0})
    assert scalar_reward(judgement, rewards) == 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_a_reward_is_a_finite_number(value: float) -> None:
    """[16] Neither a NaN nor what grows beyond all numbers enters a batch."""
    rewards = GuidanceRewards(custom="mine:reward", custom_weight=100.0, aspects={})
    judgement = Judgement({"em": 1.0, "f1": 1.0, "inclusion": 1.0, "custom": value})
    with pytest.raises(ValueError, match="not a finite number"):
        scalar_reward(judgement, rewards)
