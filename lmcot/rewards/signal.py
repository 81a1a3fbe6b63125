"""What a question's rationales came to, and whether a group baseline learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from lmcot.config import SignalFilter
from lmcot.config.rewards import Rewards
from lmcot.records import GroupResult, Judgement, LeftOut, Rollout, ScoredRollout


def group_results(
    rollouts: Sequence[Rollout],
    scored: Sequence[ScoredRollout | None],
    rewards: Rewards,
    signal: SignalFilter | None,
) -> list[GroupResult]:
    """The result of each question, in the order of the rollouts, question by question.

    Args:
        scored: the rollouts with their rewards; None for what could not be judged.
        signal: what leaves questions out; None if nothing does.
    """
    pairs = zip(rollouts, scored, strict=True)
    results = []
    for _, group in groupby(pairs, key=lambda pair: pair[0].example_id):
        members = [one for _, one in group]
        judged = [one for one in members if one is not None]
        right = sum(is_right(one.judgement, rewards) for one in judged)
        why = _left_out(judged, rewards, signal) if signal is not None else ""
        results.append(GroupResult(len(members), len(judged), right, why))
    return results


def is_right(judgement: Judgement, rewards: Rewards) -> bool:
    """Whether a judged rationale is right: by exact match if that has a weight, else by inclusion,
    else by an F1 of 1; never if none of them has a weight."""
    return any(judgement.components[name] == 1 for name in list(rewards.task_weights)[:1])


def task_reward(judgement: Judgement, rewards: Rewards) -> float:
    """The weighted sum of what the rewards say of the frozen LM's answer."""
    weights = rewards.task_weights.items()
    return sum(weight * judgement.components[name] for name, weight in weights)


def _left_out(judged: Sequence[ScoredRollout], rewards: Rewards, signal: SignalFilter) -> LeftOut:
    """Why nothing can be learnt from a question; empty if something can."""
    learnable = [one for one in judged if one.rollout.response_ids]
    if len(learnable) < 2:
        return "few"
    if len({_measured(one, rewards, signal) for one in learnable}) > 1:
        return ""
    if all(is_right(one.judgement, rewards) for one in learnable):
        return "right"
    if rewards.task_weights and not any(task_reward(one.judgement, rewards) for one in learnable):
        return "wrong"
    return "equal"


def _measured(one: ScoredRollout, rewards: Rewards, signal: SignalFilter) -> float:
    match signal.by:
        case "task":
            return task_reward(one.judgement, rewards)
        case "right":
            return float(is_right(one.judgement, rewards))
        case "reward":
            return one.reward
