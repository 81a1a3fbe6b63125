"""The metrics of a PPO step's rationales and judgements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmcot.records import Columns, GroupResult


def step_metrics(columns: Columns, samples: int) -> dict[str, float]:
    """Metrics of all rationales of a batch; they do not depend on which actor did what.

    Rewards, components, penalties and ``response/contains_gold`` are averages over the judged
    rationales that have them. Lengths (in tokens) and shares are averages over all rationales.

    Args:
        samples: number of rationales of each question; they stand together.
    """
    judged = columns["judged"] == 1
    rewards = columns["reward"][judged]
    gold = columns["contains_gold"][~np.isnan(columns["contains_gold"])]
    measured = {
        name: columns[name][judged & ~np.isnan(columns[name])]
        for name in columns.names
        if name.startswith(("component/", "penalty/"))
    }
    means = {name: float(values.mean()) for name, values in measured.items() if len(values)}
    return {
        "reward/mean": mean_reward(columns),
        "reward/std": float(rewards.std()) if judged.any() else 0.0,
        **_reward_spread(columns["reward"].reshape(-1, samples)),
        **means,
        **({"response/contains_gold": float(gold.mean())} if len(gold) else {}),
        **_answer_shares(columns),
        "response/length": float(columns["response_length"].mean()),
        "response/length_max": float(columns["response_length"].max()),
        "response/cut_share": float(columns["cut"].mean()),
        "batch/rationales": float(len(judged)),
        "batch/judged_share": float(judged.mean()),
        "batch/failed": float((~judged).sum()),
        "batch/unmeasured": float(columns["unmeasured"].sum()),
    }


def filter_metrics(results: Sequence[GroupResult], wanted: int) -> dict[str, float]:
    """What `refine.filter` left out of a batch.

    Args:
        results: of all questions that were asked.
        wanted: number of questions that the step wants to learn from.
    """
    why = Counter(result.left_out for result in results)
    return {
        "filter/asked": float(len(results)),
        "filter/refilled": float(len(results) - wanted),
        "filter/right": float(why["right"]),
        "filter/wrong": float(why["wrong"]),
        "filter/equal": float(why["equal"]),
        "filter/few": float(why["few"]),
        "filter/filled": why[""] / wanted,
    }


def _reward_spread(groups: npt.NDArray[np.float64]) -> dict[str, float]:
    """The lowest and highest reward; the share of questions whose rationales all have the same.

    Only questions with several judged rationales count for the share. If no question has several,
    all rationales of the step count as one question's, since PPO compares them with each other.

    Args:
        groups: [questions, rationales]; NaN where a rationale was not judged.
    """
    judged = groups[~np.isnan(groups)]
    if not len(judged):
        return {}
    several = groups[(~np.isnan(groups)).sum(1) > 1]
    if not len(several) and len(judged) > 1:
        several = judged.reshape(1, -1)
    equal = np.nanmin(several, axis=1) == np.nanmax(several, axis=1)
    return {
        "reward/min": float(judged.min()),
        "reward/max": float(judged.max()),
        **({"reward/equal_groups": float(equal.mean())} if len(equal) else {}),
    }


def mean_reward(columns: Columns) -> float:
    """Mean reward of the judged rationales; 0 if there are none."""
    judged = columns["judged"] == 1
    return float(columns["reward"][judged].mean()) if judged.any() else 0.0


def _answer_shares(columns: Columns) -> dict[str, float]:
    """Shares of the frozen LM's answers that are empty, or were cut."""
    asked = ~np.isnan(columns["answer_empty"])
    if not asked.any():
        return {}
    return {
        "answer/empty_share": float(columns["answer_empty"][asked].mean()),
        "answer/cut_share": float(columns["answer_cut"][asked].mean()),
    }
