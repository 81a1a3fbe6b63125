"""Actors that take time but compute nothing and never import torch.

In a fake Ray their time is only counted; in a real one they sleep. Their results have the size and
shape of real ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmcot.actors.base import ActorBase
from lmcot.actors.reward_actor import outcome
from lmcot.actors.units import KeptScoreUnit, Packed, RolloutUnit, Scored
from lmcot.config import ASPECTS, Config
from lmcot.records import Answer, Judgement, Rollout, Usage

SAMPLE_S, JUDGE_S, LEARN_S = 1.0, 0.5, 2.0
PROMPT, RESPONSE = 250, 64
"""Number of tokens of a prompt and of a response."""
_chance = random.Random(0)
_WORDS = ("the", "film", "was", "made", "by", "a", "man", "who", "lived", "near", "that", "town")
_IDS = [tuple(_chance.choices(range(49152), k=RESPONSE)) for _ in range(64)]
_PROMPT = tuple(_chance.choices(range(49152), k=PROMPT))
_LOGPROBS = [tuple(-_chance.expovariate(1.0) for _ in range(RESPONSE)) for _ in range(64)]
_TEXTS = [" ".join(_chance.choices(_WORDS, k=48)) for _ in range(64)]
COMPONENTS = ("em", "f1", "inclusion", *(f"aspect/{name}" for name in ASPECTS))


def sampled(unit: RolloutUnit) -> Packed[list[Rollout]]:
    """Rationales as a policy would return them."""
    examples = unit.questions.open()
    picked = iter(_chance.sample(range(64), len(examples) * unit.samples))
    return Packed.of([
        Rollout(
            unit.unit_id, example.id, k, _PROMPT, _IDS[one := next(picked)],
            _LOGPROBS[one], "length", _TEXTS[one], unit.policy_version,
        )
        for example in examples
        for k in range(unit.samples)
    ])  # fmt: skip


def judged(unit: KeptScoreUnit, rollouts: Sequence[Rollout], config: Config) -> Scored:
    """Judgements as a reward actor would return them."""
    values = dict.fromkeys(COMPONENTS, 0.5)
    judgements = [
        Judgement({**values, "em": float(number % 2)}, Answer("a", "a", 400, 8), True)
        for number in range(len(rollouts))
    ]
    usage = Usage(len(judgements), len(judgements), 4000)
    return replace(
        outcome(unit.questions.open(), rollouts, judgements, config),
        usage=usage,
        frozen_seconds=JUDGE_S,
    )


class Sleeper(ActorBase):
    """A stand-in for a rollout actor, in a separate process, that sleeps."""

    def setup(self) -> str:
        """Returns at once, without notices."""
        return ""

    def sample(self, unit: RolloutUnit) -> Packed[list[Rollout]]:
        """Sleeps for a unit's time and returns its rationales."""
        time.sleep(SAMPLE_S)
        return sampled(unit)


def about(seconds: float) -> float:
    """The given time, varied by up to a fifth."""
    return seconds * _chance.uniform(0.8, 1.2)


def training_metrics() -> dict[str, Any]:
    """As many metrics as a PPO step returns."""
    return {"kl": 0.1, "batch/tokens": 4096.0, **{f"metric/{number}": 0.5 for number in range(20)}}
