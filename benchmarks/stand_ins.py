"""Actors that take their time and compute nothing; they never import torch.

In a fake Ray they are told of, in a real one they sleep; what they give back is of the size and the
shape of the real thing.
"""

from __future__ import annotations

import random
import time
from typing import Any, get_args

from lmcot.actors.base import ActorBase
from lmcot.actors.units import Judged, JudgeUnit, RolloutUnit
from lmcot.config import Aspect
from lmcot.records import Answer, Judgement, Rollout, Usage

SAMPLE_S, JUDGE_S, LEARN_S = 1.0, 0.5, 2.0
RESPONSE = 64
"""Tokens of a response."""
_chance = random.Random(0)
_WORDS = ("the", "film", "was", "made", "by", "a", "man", "who", "lived", "near", "that", "town")
_IDS = [tuple(_chance.choices(range(49152), k=RESPONSE)) for _ in range(64)]
_LOGPROBS = [tuple(-_chance.expovariate(1.0) for _ in range(RESPONSE)) for _ in range(64)]
_TEXTS = [" ".join(_chance.choices(_WORDS, k=48)) for _ in range(64)]
COMPONENTS = ("em", "f1", "inclusion", *(f"aspect/{name}" for name in get_args(Aspect)))


def sampled(unit: RolloutUnit) -> list[Rollout]:
    """Rationales as a policy would give them back."""
    picked = iter(_chance.sample(range(64), len(unit.prompts) * unit.samples))
    return [
        Rollout(
            unit.unit_id, prompt.example_id, k, prompt.prompt_ids, _IDS[one := next(picked)],
            _LOGPROBS[one], "length", _TEXTS[one], unit.policy_version,
        )
        for prompt in unit.prompts
        for k in range(unit.samples)
    ]  # fmt: skip


def judged(unit: JudgeUnit) -> Judged:
    """Judgements as the reward side would give them."""
    values = dict.fromkeys(COMPONENTS, 0.5)
    judgements = [
        Judgement({**values, "em": float(number % 2)}, Answer("a", "a", 400, 8), True)
        for number in range(len(unit.rollouts))
    ]
    return Judged(judgements, Usage(len(judgements), len(judgements), 4000), JUDGE_S)


class Sleeper(ActorBase):
    """A rollout actor in a process of its own, as far as a driver can tell."""

    def setup(self) -> str:
        """Is ready at once."""
        return ""

    def sample(self, unit: RolloutUnit) -> list[Rollout]:
        """Gives back a unit's rationales when their time has passed."""
        time.sleep(SAMPLE_S)
        return sampled(unit)


def about(seconds: float) -> float:
    """That time, give or take a fifth."""
    return seconds * _chance.uniform(0.8, 1.2)


def training_metrics() -> dict[str, Any]:
    """As many as a PPO step gives back."""
    return {"kl": 0.1, "batch/tokens": 4096.0, **{f"metric/{number}": 0.5 for number in range(20)}}
