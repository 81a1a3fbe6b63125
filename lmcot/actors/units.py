"""Work units: fixed micro-batches that come out the same whoever does them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lmcot.data.sampler import sample_seed
from lmcot.records import Example, Judgement, Prompt, Rollout, Sampling, Usage


@dataclass(frozen=True, slots=True)
class RolloutPrompt:
    """One question of a rollout unit, already as token ids."""

    example_id: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RolloutUnit:
    """Some questions, each to be sampled ``samples`` times by one version of the policy."""

    unit_id: str
    prompts: tuple[RolloutPrompt, ...]
    samples: int
    temperature: float
    max_new_tokens: int
    seed: int
    step: int
    policy_version: int
    weights: tuple[Any, ...] = ()
    """The object reference of that version's weights, in a tuple so that Ray does not resolve it
    on the way; none: the weights of the actor's own source."""

    def sample_seed(self, example_id: str, sample: int) -> int:
        """Seed of one sample: a function of (run seed, step, question, k) alone."""
        return sample_seed(self.seed, self.step, example_id, sample)


@dataclass(frozen=True, slots=True)
class JudgeUnit:
    """Rollouts to be judged, each beside its example."""

    unit_id: str
    examples: tuple[Example, ...]
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """What a reward actor gives back for a unit."""

    judgements: list[Judgement]
    usage: Usage = field(default_factory=Usage)
    """What the frozen LM was asked for it."""
    frozen_seconds: float = 0.0
    """That the frozen LM's actors worked on it."""


@dataclass(frozen=True, slots=True)
class PromptUnit:
    """Prompts for the frozen LM."""

    unit_id: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
