"""What a PPO step's rationales and judgements add up to."""

from __future__ import annotations

import numpy as np

from lmcot.records import Columns


def step_metrics(columns: Columns) -> dict[str, float]:
    """Metrics from the numbers of the rationales in their order, so that they do not depend on
    who did the work.

    Rewards, components, penalties and ``response/contains_gold`` are of the judged rationales that
    have them, lengths in tokens and the shares that were cut and judged of all.
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
        "reward/mean": float(rewards.mean()) if judged.any() else 0.0,
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


def _answer_shares(columns: Columns) -> dict[str, float]:
    """Shares of the frozen LM's answers that came out empty, or were cut."""
    asked = ~np.isnan(columns["answer_empty"])
    if not asked.any():
        return {}
    return {
        "answer/empty_share": float(columns["answer_empty"][asked].mean()),
        "answer/cut_share": float(columns["answer_cut"][asked].mean()),
    }
