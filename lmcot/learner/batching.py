"""How the responses of one optimiser step are cut into micro-batches and dealt out to the ranks.

The plan is a pure function of the lengths: every rank computes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lmcot.learner.ranks import rank, world_size
from lmcot.models.sequences import Row, SequenceBatch, make_batch

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and response ids (EOS included)."""


class Lengths(NamedTuple):
    """Lengths of one prompt and response, in tokens."""

    prompt: int
    response: int


Group = tuple[int, ...]
"""Indices of responses that go through the model as one row, behind one prompt."""
Shape = tuple[int, ...]
"""Length of a row; with an encoder, the lengths of its prompt and of its responses."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Responses that go through the model at once."""

    groups: tuple[Group, ...]
    counted: bool = True
    """False for a filler, whose loss counts 0: its rank has nothing left but must take part."""

    @property
    def indices(self) -> list[int]:
        """Indices of all its responses, in the order in which they are laid out."""
        return [index for group in self.groups for index in group]


def plan_micro_batches(
    lengths: Sequence[Lengths],
    prompts: Sequence[int],
    *,
    budget: int,
    ranks: int = 1,
    share: bool = True,
    apart: bool = False,
) -> list[list[MicroBatch]]:
    """Micro-batches of each rank: equally many, and of similar cost in each round.

    Args:
        lengths: the lengths of each response and its prompt.
        prompts: a number for each response; responses of one number have one prompt.
        budget: padded tokens that go through the model at once.
        ranks: number of ranks that share the work.
        share: whether responses to one prompt may share it.
        apart: whether an encoder reads the prompts, which are then padded separately.

    Returns:
        the micro-batches of each rank. The longest come first, so that running out of memory
        shows at once.
    """
    groups = _groups(lengths, prompts, budget, share)

    def shape(group: Group) -> Shape:
        prompt, responses = lengths[group[0]].prompt, sum(lengths[i].response for i in group)
        return (prompt, responses) if apart else (prompt + responses,)

    def cost(batch: Sequence[Group]) -> int:
        return _padded_tokens([shape(group) for group in batch])

    groups.sort(key=lambda group: (-sum(shape(group)), shape(group)))
    shapes = [shape(group) for group in groups]
    fewest = len(_fill(shapes, budget))
    wanted = -(-fewest // ranks) * ranks
    sizes = _fill(shapes, _least_cap(shapes, budget, wanted))
    batches, start = [], 0
    for size in sizes:
        batches.append(groups[start : start + size])
        start += size
    while len(batches) % ranks and (divisible := [b for b in batches if _is_divisible(b)]):
        largest = batches.index(max(divisible, key=cost))
        batches[largest : largest + 1] = _halves(batches[largest])
    planned = [MicroBatch(tuple(batch)) for batch in batches]
    planned.sort(key=lambda batch: -cost(batch.groups))
    while len(planned) % ranks:
        planned.append(MicroBatch((planned[-1].groups[-1][:1],), counted=False))
    return [_dealt(planned, rank, ranks) for rank in range(ranks)]


@dataclass(frozen=True, slots=True)
class BatchPlanner:
    """Plans micro-batches for this process and lays them out as tensors."""

    pad_id: int
    start_id: int | None
    """The token that an encoder-decoder's decoder starts with."""
    budget: int
    """Padded tokens in a micro-batch."""
    share: bool
    """Whether responses to one prompt share it."""

    def plan(self, pairs: Sequence[TokenPair], indices: Sequence[int]) -> list[MicroBatch]:
        """This rank's micro-batches of some of the pairs; they hold indices into ``pairs``."""
        numbers: dict[tuple[int, ...], int] = {}
        prompts = [numbers.setdefault(tuple(pairs[i][0]), len(numbers)) for i in indices]
        plans = plan_micro_batches(
            [Lengths(len(pairs[i][0]), len(pairs[i][1])) for i in indices],
            prompts,
            budget=self.budget,
            ranks=world_size(),
            share=self.share,
            apart=self.start_id is not None,
        )
        return [
            MicroBatch(
                tuple(tuple(indices[member] for member in group) for group in batch.groups),
                batch.counted,
            )
            for batch in plans[rank()]
        ]

    def lay_out(self, pairs: Sequence[TokenPair], batch: MicroBatch) -> SequenceBatch:
        """A micro-batch as tensors."""
        rows = [
            Row(pairs[group[0]][0], [pairs[index][1] for index in group]) for group in batch.groups
        ]
        return make_batch(rows, pad_id=self.pad_id, start_id=self.start_id)


def split_evenly(rows: Sequence[int], parts: int) -> list[list[int]]:
    """Cuts rows into consecutive parts whose sizes differ by one at most."""
    base, larger = divmod(len(rows), parts)
    result, start = [], 0
    for part in range(parts):
        end = start + base + (part < larger)
        result.append(list(rows[start:end]))
        start = end
    return [part for part in result if part]


def _groups(
    lengths: Sequence[Lengths], prompts: Sequence[int], budget: int, share: bool
) -> list[Group]:
    """Responses by prompt, cut where a row would exceed the budget."""
    members: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt if share else index, []).append(index)
    groups = []
    for indices in members.values():
        row: list[int] = []
        for index in sorted(indices, key=lambda index: (-lengths[index].response, index)):
            if row and _row_length(lengths, (*row, index)) > budget:
                groups.append(tuple(row))
                row = []
            row.append(index)
        groups.append(tuple(row))
    return groups


def _row_length(lengths: Sequence[Lengths], group: Sequence[int]) -> int:
    return lengths[group[0]].prompt + sum(lengths[index].response for index in group)


def _padded_tokens(rows: Sequence[Shape]) -> int:
    return len(rows) * sum(max(widths) for widths in zip(*rows, strict=True))


def _fill(rows: Sequence[Shape], cap: int) -> list[int]:
    """Number of rows in each micro-batch, if each is filled up to the cap in turn."""
    sizes: list[int] = []
    widest: Shape = ()
    for row in rows:
        wider = tuple(map(max, widest, row))
        if sizes and (sizes[-1] + 1) * sum(wider) <= cap:
            sizes[-1] += 1
            widest = wider
        else:
            sizes.append(1)
            widest = row
    return sizes


def _least_cap(rows: Sequence[Shape], budget: int, wanted: int) -> int:
    """The smallest cap that needs no more micro-batches than wanted, which evens them out."""
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_fill(rows, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return low


def _is_divisible(batch: Sequence[Group]) -> bool:
    """Whether the batch holds more than one response."""
    return len(batch) > 1 or len(batch[0]) > 1


def _halves(batch: Sequence[Group]) -> list[list[Group]]:
    if len(batch) > 1:
        middle = (len(batch) + 1) // 2
        return [list(batch[:middle]), list(batch[middle:])]
    middle = (len(batch[0]) + 1) // 2
    return [[batch[0][:middle]], [batch[0][middle:]]]


def _dealt(batches: Sequence[MicroBatch], rank: int, ranks: int) -> list[MicroBatch]:
    """One batch of each round; the direction alternates so that no rank always gets the largest."""
    dealt = []
    for number, start in enumerate(range(0, len(batches), ranks)):
        turn = rank if number % 2 == 0 else ranks - 1 - rank
        dealt.append(batches[start + turn])
    return dealt
