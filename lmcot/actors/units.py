"""Work units: fixed micro-batches whose results do not depend on which actor runs them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lmcot.actors.kept import Kept
from lmcot.config import SignalFilter
from lmcot.data.sampler import sample_seed
from lmcot.records import (
    Columns,
    Example,
    Failure,
    GroupResult,
    Judgement,
    Prompt,
    Rollout,
    Sampling,
    ScoredRollout,
    Usage,
)

_Record = TypeVar("_Record")
WeightsRef = tuple[Any, ...]
"""Ray's reference to a published version's weights, in a tuple so that Ray does not resolve it on
the way; empty: the weights of the actor's own source."""


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
    weights: WeightsRef = ()
    """That version's weights."""

    def sample_seed(self, example_id: str, sample: int) -> int:
        """Seed of one sample: a function of (run seed, step, question, k) alone."""
        return sample_seed(self.seed, self.step, example_id, sample)


@dataclass(frozen=True, slots=True)
class JudgeUnit:
    """Texts to be judged as rationales, one for each question."""

    unit_id: str
    questions: Packed[tuple[Example, ...]]
    rationales: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """The judgements of a `JudgeUnit`, in the order of its rationales."""

    judgements: tuple[Judgement, ...]
    usage: Usage
    """Requests to the frozen LM."""


@dataclass(frozen=True, slots=True)
class ScoreUnit:
    """Rollouts to be judged and scored, with the questions that they were sampled for."""

    unit_id: str
    questions: Packed[tuple[Example, ...]]
    rollouts: Packed[list[Rollout]]
    signal: SignalFilter | None = None
    """Leaves questions out that teach nothing; None: all are learnt from."""


@dataclass(frozen=True, slots=True)
class KeptScoreUnit:
    """A `ScoreUnit` whose rollouts are in the object store."""

    unit_id: str
    questions: Packed[tuple[Example, ...]]
    rollouts: Kept[Packed[list[Rollout]]]
    signal: SignalFilter | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """What the driver sees of a `ScoreUnit`'s scores."""

    columns: Columns
    """The numbers of each rollout."""
    results: tuple[GroupResult, ...] = ()
    """What each question's rollouts came to, in order."""
    failures: tuple[Failure, ...] = ()
    """Why rollouts could not be judged, one for each of them."""
    unmeasured: tuple[tuple[str, str], ...] = ()
    """Components of weight 0 that could not be measured, each with the first reason."""
    usage: Usage = field(default_factory=Usage)
    """Requests to the frozen LM."""
    frozen_seconds: float = 0.0
    """Seconds that the frozen LM's actors worked on the unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Tally):
    """The scores of a `ScoreUnit`."""

    scored: Packed[list[ScoredRollout]]
    """The rollouts that are learnt from: those that could be judged, of questions that are not
    left out. No failure is ever given a reward. Without what PPO does not read: the text, the
    judgement and the penalties."""
    records: bytes
    """A line of JSON for each rollout."""

    @property
    def tally(self) -> Tally:
        """What the driver sees."""
        return Tally(**{name: getattr(self, name) for name in Tally.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class PromptUnit:
    """Prompts for the frozen LM."""

    unit_id: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    options: tuple[str, ...] = ()
    """Options that it chooses from; empty: it writes a reply."""
