"""What a PPO step's rationales and judgements add up to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from lmcot.records import Judgement, Rollout, ScoredRollout, Usage, to_json


def step_metrics(
    rollouts: Sequence[Rollout],
    judgements: Sequence[Judgement],
    scored: Sequence[ScoredRollout],
) -> dict[str, float]:
    """Metrics from the ordered records, so that they do not depend on who did the work.

    Rewards, components, penalties and ``response/contains_gold`` are of the judged rationales,
    lengths in tokens and the shares that were cut and judged of all.
    """
    rewards = [s.reward for s in scored]
    names = scored[0].judgement.components if scored else {}
    components = {
        f"component/{name}": _mean(s.judgement.components[name] for s in scored) for name in names
    }
    taken = {
        name: _mean(s.penalties[name] for s in scored)
        for name in (scored[0].penalties if scored else ())
    }
    gold = [s.judgement.contains_gold for s in scored if s.judgement.contains_gold is not None]
    return {
        "reward/mean": _mean(rewards),
        "reward/std": statistics.pstdev(rewards) if rewards else 0.0,
        **components,
        **taken,
        **({"response/contains_gold": _mean(map(float, gold))} if gold else {}),
        "response/length": _mean(float(len(r.response_ids)) for r in rollouts),
        "response/length_max": float(max(len(r.response_ids) for r in rollouts)),
        "response/cut_share": _mean(float(r.finish_reason == "length") for r in rollouts),
        "batch/rationales": float(len(rollouts)),
        "batch/judged_share": len(scored) / len(rollouts),
        "batch/failed": float(sum(j.failure is not None for j in judgements)),
    }


def usage_metrics(usage: Usage) -> dict[str, float]:
    """Requests to the frozen LM, the share that its cache answered, tokens for the others."""
    if not usage.asked:
        return {}
    return {
        "frozen/requests": float(usage.asked),
        "frozen/cache_hit_rate": 1 - usage.sent / usage.asked,
        "frozen/tokens": float(usage.tokens),
    }


def rollout_records(
    rollouts: list[Rollout], judgements: list[Judgement], scored: list[ScoredRollout]
) -> list[dict[str, Any]]:
    """One record for each rationale of a step; ``reward`` is null where it was not judged."""
    rewards = {(s.rollout.example_id, s.rollout.sample): s.reward for s in scored}
    return [
        {
            **to_json(rollout),
            "judgement": to_json(judgement),
            "reward": rewards.get((rollout.example_id, rollout.sample)),
        }
        for rollout, judgement in zip(rollouts, judgements, strict=True)
    ]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return statistics.fmean(listed) if listed else 0.0
