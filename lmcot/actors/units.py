"""Work units: fixed micro-batches that come out the same whoever does them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lmcot.data.sampler import sample_seed
from lmcot.records import Columns, Example, Failure, Prompt, Rollout, Sampling, ScoredRollout, Usage

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class Packed(Generic[_Record]):
    """What passes through the driver unread, from one actor to another.

    Records are many small objects: to pickle and unpickle them on their way would be most of what
    the driver does. Bytes are copied. They never leave the cluster.
    """

    data: bytes

    @classmethod
    def of(cls, value: _Record) -> Packed[_Record]:
        """Packs a value."""
        return cls(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))

    def open(self) -> _Record:
        """The value."""
        value: _Record = pickle.loads(self.data)
        return value


@dataclass(frozen=True, slots=True)
class RolloutUnit:
    """Some questions, each to be sampled ``samples`` times by one version of the policy."""

    unit_id: str
    questions: Packed[tuple[Example, ...]]
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
    """A unit's questions, and what was sampled for them, to be judged."""

    unit_id: str
    questions: Packed[tuple[Example, ...]]
    rollouts: Packed[list[Rollout]]


@dataclass(frozen=True, slots=True)
class Judged:
    """What a reward actor gives back for a unit."""

    scored: Packed[list[ScoredRollout]]
    """What can be learnt from: what could not be judged is left out, never given a reward."""
    columns: Columns
    """What the driver sees of each rationale."""
    records: bytes
    """A line of JSON for each rationale."""
    failures: tuple[Failure, ...] = ()
    """In place of a judgement, each."""
    unmeasured: tuple[tuple[str, str], ...] = ()
    """Components of weight 0 that could not be measured, each with the first reason."""
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
