"""The metrics of a PPO step's rationales and judgements."""

from __future__ import annotations

import numpy as np

from lmcot.records import Columns


def step_metrics(columns: Columns) -> dict[str, float]:
    """Metrics of a batch; they do not depend on which actor did what.

    Rewards, components, penalties and ``response/contains_gold`` are averages over the judged
    rationales that have them. Lengths (in tokens) and shares are averages over all rationales.
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
