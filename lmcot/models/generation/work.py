"""The engine's own view of requests: tasks, the sequences that they read, the rows they write."""

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
    """Sequences that are read for it."""
    samples: int = 0
    """Number of complete samples of a `SampleRequest`."""
    logprobs: list[list[float]] = field(default_factory=list)
    """Of a `ScoreRequest`: for each continuation those that are there so far."""


@dataclass(eq=False)
class Sequence:
    """Tokens that the model (an encoder-decoder's decoder) reads, and which logits are wanted."""

    task: Task
    tokens: tuple[int, ...]
    wanted_from: int
    """Logits are wanted at this token and at all behind it."""
    continuations: tuple[int, ...] = ()
    """Those of a `ScoreRequest` that read these tokens: they differ in their last one at most."""
    leaf: TreeNode | None = None
    """Where they end in the tree."""
    source: Entry | None = None
    """What an encoder read for them."""


@dataclass(eq=False)
class Row:
    """One sample that is being written."""

    task: Task
    sample: int
    uniforms: list[float]
    """A number in [0, 1) for each token."""
    next_token: int
    """What the model reads next."""
    source: Entry | None = None
    """What an encoder read for it."""
    entries: list[Entry] = field(default_factory=list)
    """The prefixes that it is behind."""
    start: int = 0
    """Position of the first token that it reads itself."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def request(self) -> SampleRequest:
        """What it is written for."""
        assert isinstance(self.task.request, SampleRequest)
        return self.task.request

    def take(self, token: int, logprob: float) -> FinishReason | None:
        """One more token; why the sample ends with it, if it does."""
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
    """Some rows of the logits, that belong to a sequence."""

    sequence: Sequence
    first: int
    """The token of the sequence that the first of them comes from."""
    length: int


class Logits(NamedTuple):
    """What a forward pass gives: first one row for each of ``rows``, then those of ``wanted``."""

    values: Tensor
    """[n, vocabulary]"""
    rows: list[Row]
    wanted: list[Wanted]


class Decoder(Protocol):
    """Runs the model over what is at work, one step at a time; called in inference mode."""

    def fits(self, task: Task) -> bool:
        """Whether a task can be taken up now."""
        ...

    def admit(self, task: Task) -> None:
        """Takes up a task."""
        ...

    def forward(self) -> Logits:
        """One pass of the model."""
        ...

    def spawn(self, sequence: Sequence, rows: list[Row]) -> None:
        """These rows go on behind a sequence that has been read."""
        ...

    def remove(self, row: Row) -> None:
        """A row is done."""
        ...

    def release(self, task: Task) -> None:
        """A task is done, or given up: lets go of all that is held for it."""
        ...

    def clear(self) -> None:
        """Forgets what was kept for later tasks."""
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
    """What has to be read for a task.

    Continuations that are one token, or differ in their last token only, are told by the same
    logits.

    Args:
        start_token: what an encoder-decoder's decoder starts with; its prompt is not among the
            tokens.
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
