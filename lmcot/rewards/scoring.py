"""The rewards of a unit's judgements, and the numbers that are averaged over a step.

This is done in the reward actors; the driver only aggregates columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lmcot.config.rewards import Rewards
from lmcot.records import Columns, Judgement, Missing, Rollout, ScoredRollout
from lmcot.rewards.combine import scalar_reward, taken_off


def score(
    rollouts: Sequence[Rollout],
    judgements: Sequence[Judgement],
    rewards: Rewards,
    max_new_tokens: int,
) -> list[ScoredRollout | None]:
    """The reward of each rationale; None, never a reward, for what could not be judged.

    Args:
        max_new_tokens: the length limit of the rationales, which the penalties refer to.
    """
    scored: list[ScoredRollout | None] = []
    for rollout, judgement in zip(rollouts, judgements, strict=True):
        if judgement.failure is not None:
            scored.append(None)
            continue
        taken = taken_off(rollout, rewards.penalties, max_new_tokens)
        reward = scalar_reward(judgement, rewards) - sum(taken.values())
        scored.append(ScoredRollout(rollout, judgement, reward, taken))
    return scored


def columns(
    rollouts: Sequence[Rollout],
    judgements: Sequence[Judgement],
    scored: Sequence[ScoredRollout | None],
) -> Columns:
    """The numbers of each rationale, in the order of the rationales.

    Of all: ``response_length`` in tokens, ``cut`` (at the length limit) and ``judged``, 0 or 1,
    ``policy_version``. Of the judged ones, NaN for the others: ``reward``, ``component/NAME``,
    ``penalty/NAME``, ``contains_gold`` (0 or 1; NaN also where the question does not arise), and
    ``answer_empty`` and ``answer_cut``, 0 or 1, of the frozen LM's answers. A component of weight 0
    that could not be measured is NaN, too, and counted in ``unmeasured``.
    """
    found = {
        "response_length": [len(one.response_ids) for one in rollouts],
        "cut": [one.finish_reason == "length" for one in rollouts],
        "judged": [one is not None for one in scored],
        "unmeasured": [len(one.unmeasured) for one in judgements],
        "policy_version": [one.policy_version for one in rollouts],
        "reward": [math.nan if one is None else one.reward for one in scored],
        "contains_gold": [
            math.nan if one.contains_gold is None else one.contains_gold for one in judgements
        ],
        "answer_empty": [_lacks(one, "empty") for one in judgements],
        "answer_cut": [_lacks(one, "cut") for one in judgements],
    }
    good = [one for one in scored if one is not None]
    for name in dict.fromkeys(name for one in good for name in one.judgement.components):
        found[f"component/{name}"] = [
            math.nan if s is None else s.judgement.components.get(name, math.nan) for s in scored
        ]
    for name in good[0].penalties if good else ():
        found[name] = [math.nan if s is None else s.penalties[name] for s in scored]
    return Columns(tuple(found), np.array(list(found.values()), dtype=np.float64))


def _lacks(judgement: Judgement, missing: Missing) -> float:
    """Whether the frozen LM's answer is missing for this reason; NaN where it was not asked."""
    return math.nan if judgement.answer is None else float(judgement.answer.missing == missing)


def unmeasured(judgements: Sequence[Judgement]) -> dict[str, str]:
    """Components of weight 0 that could not be measured, each with the first reason."""
    return {name: reason for one in reversed(judgements) for name, reason in one.unmeasured.items()}
