"""The engine's internal view of requests: tasks, sequences to read and rows to write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from lmcot.models.generation.requests import (
    FinishReason,
    Generated,
    Request,
    SampleRequest,
    ScoreRequest,
)
from lmcot.models.generation.sampling import uniforms

if TYPE_CHECKING:
    from lmcot.models.generation.stacks import Entry
    from lmcot.models.generation.tree import TreeNode


@dataclass(eq=False)
class Task:
    """One request that is waiting or in flight."""

    number: int
    request: Request
    sequences: list[Sequence] = field(default_factory=list)
    """Sequences to read for this task."""
    samples: int = 0
    """Number of complete samples of a `SampleRequest`."""
    logprobs: list[list[float]] = field(default_factory=list)
    """Log-probabilities so far for each continuation of a `ScoreRequest`."""


@dataclass(eq=False)
class Sequence:
    """Tokens that the model (or its decoder) reads, and the logits that are wanted."""

    task: Task
    tokens: tuple[int, ...]
    wanted_from: int
    """Index of the first token whose logits are wanted; those of all later ones are, too."""
    continuations: tuple[int, ...] = ()
    """Continuations of a `ScoreRequest` that share these tokens; only their last token differs."""
    leaf: TreeNode | None = None
    """Node of the tree at which the sequence ends."""
    source: Entry | None = None
    """Encoded prompt of an encoder-decoder."""


@dataclass(eq=False)
class Row:
    """One sample in progress."""

    task: Task
    sample: int
    uniforms: list[float]
    """One uniform number in [0, 1) per token."""
    next_token: int
    """Token that the model reads next."""
    source: Entry | None = None
    """Encoded prompt of an encoder-decoder."""
    entries: list[Entry] = field(default_factory=list)
    """Prefixes that the sample continues."""
    start: int = 0
    """Position of the first token that the sample reads itself."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def request(self) -> SampleRequest:
        """The request that this sample belongs to."""
        assert isinstance(self.task.request, SampleRequest)
        return self.task.request

    def take(self, token: int, logprob: float) -> FinishReason | None:
        """Appends a token; returns the finish reason if the sample ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.next_token = token
        if token in self.request.eos_ids:
            return "eos"
        if self.request.stop is not None and self.request.stop(self.tokens):
            return "stop"
        return "length" if len(self.tokens) == self.request.max_new_tokens else None

    def generated(self, reason: FinishReason) -> Generated:
        """The finished sample."""
        return Generated(tuple(self.tokens), tuple(self.logprobs), reason)


class Wanted(NamedTuple):
    """Rows of the logits that belong to one sequence."""

    sequence: Sequence
    first: int
    """Index of the sequence's token that gives the first row."""
    length: int


class Logits(NamedTuple):
    """The result of a forward pass: one row for each of ``rows``, then those of ``wanted``."""

    values: Tensor
    """Logits [n, vocabulary]."""
    rows: list[Row]
    wanted: list[Wanted]


class Decoder(Protocol):
    """Runs the model over the tasks in flight, one step at a time, in inference mode."""

    def fits(self, task: Task) -> bool:
        """Whether a task can be admitted now."""
        ...

    def admit(self, task: Task) -> None:
        """Adds a task to those in flight."""
        ...

    def forward(self) -> Logits:
        """Runs one pass of the model."""
        ...

    def spawn(self, sequence: Sequence, rows: list[Row]) -> None:
        """Adds rows that continue a sequence that has been read."""
        ...

    def remove(self, row: Row) -> None:
        """Removes a finished row."""
        ...

    def release(self, task: Task) -> None:
        """Frees all that is held for a finished or cancelled task."""
        ...

    def clear(self) -> None:
        """Drops the prefixes kept for later tasks."""
        ...


def make_rows(task: Task, start_token: int) -> list[Row]:
    """The rows of a task's samples."""
    request = task.request
    assert isinstance(request, SampleRequest)
    return [
        Row(
            task,
            sample,
            uniforms(seed, request.max_new_tokens).tolist(),
            start_token,
        )
        for sample, seed in enumerate(request.seeds)
    ]


def make_sequences(task: Task, start_token: int | None) -> list[Sequence]:
    """The sequences to read for a task.

    Continuations of one token, or that only differ in their last token, share one sequence.

    Args:
        start_token: the decoder's start token, which replaces the prompt; None for a
            decoder-only model.
    """
    request = task.request
    prompt = tuple(request.prompt_ids) if start_token is None else (start_token,)
    wanted_from = len(prompt) - 1
    if not isinstance(request, ScoreRequest):
        return [Sequence(task, prompt, wanted_from)]
    readers: dict[tuple[int, ...], list[int]] = {}
    for index, continuation in enumerate(request.continuations):
        readers.setdefault(tuple(continuation[:-1]), []).append(index)
    return [
        Sequence(task, prompt + read, wanted_from, tuple(indices))
        for read, indices in readers.items()
    ]
