"""Plain, picklable, cheap records that flow between rooms.

Token ids are the truth. What the sampler emitted is what the learner trains on; text is kept for
people and for the frozen LM, and is never tokenised again for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant"]
Missing = Literal["", "empty", "cut"]
"""Why a reply holds no answer: it has none, or was cut before it. Empty if it holds one."""
_Record = TypeVar("_Record")


def _quickly_pickled(cls: type[_Record]) -> type[_Record]:
    """Speeds up pickling for records by the thousand: dataclasses with slots look up their fields
    each time, which takes longer than the rest."""
    names = tuple(one.name for one in fields(cls))  # type: ignore[arg-type]
    read = attrgetter(*names)

    def __setstate__(self: _Record, state: tuple[Any, ...]) -> None:
        for name, value in zip(names, state, strict=True):
            object.__setattr__(self, name, value)

    cls.__getstate__ = lambda self: read(self)  # type: ignore[method-assign]
    cls.__setstate__ = __setstate__  # type: ignore[attr-defined]
    return cls


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class Paragraph:
    """One passage of a context: a title and its sentences."""

    title: str
    sentences: tuple[str, ...]


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class SupportingFact:
    """A pointer to one sentence of the context: paragraph title and sentence index (from 0)."""

    title: str
    sent_id: int


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class Example:
    """One question with its context and gold answer, as every loader gives it."""

    id: str
    question: str
    answer: str
    context: tuple[Paragraph, ...]
    supporting_facts: tuple[SupportingFact, ...] = ()
    type: str = ""
    level: str = ""
    dataset: str = ""
    aliases: tuple[str, ...] = ()
    """Other right answers that the data set lists."""
    facts: tuple[str, ...] = ()
    """Supporting facts that stand in no passage, as text: the data set's own solution."""
    first_answer: str = ""
    """What the frozen LM answered first, which the small LM advises on; empty without advice."""

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers, the main one first."""
        return (self.answer, *self.aliases)

    def gold_sentences(self) -> tuple[str, ...]:
        """The sentences that the supporting facts point to, in the order of the context, or the
        facts that came as text.

        Facts that point outside the context are ignored (2WikiMultiHopQA has a few).
        """
        wanted = {(fact.title, fact.sent_id) for fact in self.supporting_facts}
        pointed = tuple(
            sentence.strip()
            for paragraph in self.context
            for index, sentence in enumerate(paragraph.sentences)
            if (paragraph.title, index) in wanted
        )
        return (*pointed, *self.facts)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a prompt. A prompt is a tuple of these; its backend renders it."""

    role: Role
    content: str


Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The frozen LM's sampling settings: greedy at temperature 0, else seeded."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | None = ()
    """Strings before which the reply ends. None: before a blank line if prompts are plain text, and
    where the model ends it if they are rendered by a chat template."""


class FailureKind(StrEnum):
    """The kind of a failure, which says whether a retry may help."""

    TRANSIENT = "transient"
    PERMANENT = "permanent"


@dataclass(frozen=True, slots=True)
class Failure:
    """A typed failure, returned in place of a result: never a reward of zero."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The frozen LM's reply to one prompt, with ``tokens_in`` and ``tokens_out`` as it counts
    them."""

    text: str
    """The reply; empty if it is only hidden thinking."""
    tokens_in: int
    tokens_out: int
    """Tokens written, including those of the thinking."""
    finish_reason: Literal["stop", "length"]
    thinking: str = ""
    """Hidden thinking, or a note if the endpoint does not show it; empty if there is none."""
    estimated: bool = False
    """Whether a count is an estimate by length because the endpoint gave none."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The frozen LM's probabilities of some short options; they sum to 1 over the options."""

    probabilities: dict[str, float]
    tokens_in: int
    tokens_out: int
    estimated: bool = False
    """As in `Completion`."""


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood (natural log) of a continuation, summed over its ``tokens``."""

    logprob: float
    tokens: int
    tokens_in: int
    estimated: bool = False
    """As in `Completion`."""


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class Answer:
    """A reply of the frozen LM, and the answer that was read out of it (see `read_answer`)."""

    text: str
    """The reply; empty if it is nothing but hidden thinking."""
    extracted: str
    """The answer; empty if the reply holds none."""
    tokens_in: int
    tokens_out: int
    missing: Missing = ""
    """Why the reply holds no answer; empty if it does."""
    estimated: bool = False
    """Whether a count of tokens is an estimate, since the endpoint gave none."""
    silent: str = ""
    """Why the reply is nothing but hidden thinking, and what to do; empty if it says something."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Requests to the frozen LM and their tokens; adds up with ``+``."""

    asked: int = 0
    """Number of requests made."""
    sent: int = 0
    """Requests sent to the model; the cache answered the others."""
    tokens: int = 0
    """Tokens that the model read and wrote for requests that were sent."""
    estimated: int = 0
    """Requests sent whose tokens are an estimate because the endpoint counts none."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.asked + other.asked,
            self.sent + other.sent,
            self.tokens + other.tokens,
            self.estimated + other.estimated,
        )


@dataclass(frozen=True, slots=True)
class Annotation:
    """A teacher's rationale for a training question: one line of ``rationales.jsonl``.

    A question may have several, of which at most one is kept.
    """

    example_id: str
    teacher: str
    rationale: str
    answer: str
    """The teacher's answer; empty if it gave none."""
    kept: bool
    reason: str
    """Reason why it was kept or rejected."""
    made_from: str = ""
    """Digest of the question and settings that it was made from; empty if unknown."""
    left_out: int = 0
    """Number of supporting facts that were left out to make it fit."""
    sample: int = 0
    """Its number among the teacher's rationales of the question."""
    hinted: bool = False
    """Whether the teacher was given the answer as a hint."""


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class Rollout:
    """One rationale that the small policy sampled."""

    unit_id: str
    example_id: str
    sample: int
    """Index among the question's K samples."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Token ids, with the EOS token unless the rationale was cut."""
    logprobs: tuple[float, ...]
    """Log-probability of each response token under the distribution that it was sampled from."""
    finish_reason: Literal["eos", "length"]
    text: str
    policy_version: int


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class Judgement:
    """The judgement of one rollout: reward components by name, or a failure instead."""

    components: dict[str, float] = field(default_factory=dict)
    answer: Answer | None = None
    contains_gold: bool | None = None
    """Whether the rationale holds the gold answer, as a good one should."""
    failure: Failure | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Components of weight 0 that could not be measured, and why."""


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout with its judgement and the one scalar that PPO maximises."""

    rollout: Rollout
    judgement: Judgement
    reward: float
    penalties: dict[str, float] = field(default_factory=dict)
    """Penalties subtracted from the judgement's components, by name."""


LeftOut = Literal["", "right", "wrong", "equal", "few"]
"""Why a step does not learn from a question: its rationales are all right, all wrong (their task
reward is 0), measure the same in another way, or fewer than two could be judged. Empty if it does.
"""


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What a question's rationales came to in one step."""

    rationales: int
    judged: int
    right: int
    left_out: LeftOut = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """Numbers of some rationales: a row for each name, a column for each rationale."""

    names: tuple[str, ...]
    """Names of the rows."""
    values: npt.NDArray[np.float64]
    """[names, rationales]; NaN where a rationale has no such number."""

    def __getitem__(self, name: str) -> npt.NDArray[np.float64]:
        """The numbers with this name, of all rationales."""
        return self.values[self.names.index(name)]

    @staticmethod
    def joined(parts: Sequence[Columns]) -> Columns:
        """The rationales of all parts; the numbers that a part lacks are NaN."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        return Columns(names, np.concatenate([part._with(names) for part in parts], axis=1))

    def _with(self, names: tuple[str, ...]) -> npt.NDArray[np.float64]:
        if names == self.names:
            return self.values
        nothing = np.full(self.values.shape[1], np.nan)
        return np.stack([self[name] if name in self.names else nothing for name in names])


@dataclass(slots=True)
class RunState:
    """What a resume needs besides the engine's own state: ``state.json`` of a checkpoint."""

    stage: str
    step: int = 0
    """Steps done; also the version of the policy that they made."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """State of what draws the questions, after those of the last step that was learnt."""
    kl_controller: dict[str, float] = field(default_factory=dict)
    """State of the KL controller; empty before the first step, and in ``distill``."""
    reward_statistics: dict[str, float] = field(default_factory=dict)
    """State of the reward scale, likewise."""
    validation: dict[str, float] = field(default_factory=dict)
    """What the validations of a distillation found so far; empty before the first one."""


def to_json(record: Any) -> dict[str, Any]:
    """A record as plain JSON types. Values without records are not copied."""
    # The names are cached: fields() makes them at each call, which is most of the work.
    return {name: _to_json(getattr(record, name)) for name in record.__dataclass_fields__}


def _to_json(value: Any) -> Any:
    if is_dataclass(value):
        return to_json(value)
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return tuple(to_json(one) for one in value)
    return value
