"""Combines the components of a judgement into the scalar that PPO maximises."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise

from lmcot.config import IncreasingRewards, Penalties
from lmcot.config.rewards import Rewards
from lmcot.records import Judgement, Rollout
from lmcot.rewards.components import component_weights

_INTEGER = re.compile(r"(?:(?<!\w)-)?\d+", re.ASCII)


def scalar_reward(judgement: Judgement, rewards: Rewards) -> float:
    """The weighted sum of a judgement's components (the toy task has one, of weight 1).

    Raises:
        ValueError: for a failed judgement, which is never a reward of zero; for a sum that is
            infinite or not a number.
    """
    if judgement.failure is not None:
        raise ValueError(f"a failed judgement has no reward: {judgement.failure.reason}")
    weights = {"increasing": 1.0} if rewards.kind == "increasing" else component_weights(rewards)
    total = sum(weight * judgement.components[name] for name, weight in weights.items() if weight)
    if not math.isfinite(total):
        raise ValueError(f"the reward is {total}, not a finite number: {judgement.components}")
    return total


def taken_off(rollout: Rollout, penalties: Penalties, max_new_tokens: int) -> dict[str, float]:
    """The penalties on a rationale's length, by ``penalty/NAME``; each is at least 0.

    ``missing_end``: the whole setting if the rationale was cut at the length limit. ``length``:
    nothing up to ``length_free * max_new_tokens`` tokens, from there rising linearly to the whole
    setting at ``max_new_tokens`` (the soft overlong punishment of DAPO, Yu et al. 2025, eq. 13).
    A penalty whose setting is 0 is left out.
    """
    taken = {}
    if penalties.missing_end > 0:
        cut = rollout.finish_reason == "length"
        taken["penalty/missing_end"] = penalties.missing_end if cut else 0.0
    if penalties.length > 0:
        free = penalties.length_free * max_new_tokens
        share = (len(rollout.response_ids) - free) / (max_new_tokens - free)
        taken["penalty/length"] = penalties.length * min(1.0, max(0.0, share))
    return taken


def judge_increasing(rollouts: Sequence[Rollout], settings: IncreasingRewards) -> list[Judgement]:
    """The toy task's judgements: the component ``increasing`` of each rollout."""
    return [
        Judgement({"increasing": increasing_reward(rollout.text, settings.length)})
        for rollout in rollouts
    ]


def increasing_reward(text: str, length: int) -> float:
    """The share of increases between neighbours among the first ``length`` integers of a text.

    ``#{i < length : n_i < n_(i+1)} / (length - 1)``: a missing number is no increase, and
    ``length`` (at least 2) increasing numbers are the optimum, exactly 1.
    """
    # Decimal, since int() refuses digits by the thousand.
    numbers = [Decimal(digits) for digits in _INTEGER.findall(text)[:length]]
    return sum(one < next_one for one, next_one in pairwise(numbers)) / (length - 1)
