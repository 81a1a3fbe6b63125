"""Prefixes of running samples, stacked in padded tensors so that one product serves many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcot.models.generation.attention import Partial, Scoring, attend_partly, attend_wholly
from lmcot.models.generation.suffixes import visible_from

_PADDING = 1.5
"""Maximum ratio of the longest to the shortest prefix of a stack, before `_PADDING_TOKENS`."""
_PADDING_TOKENS = 16
"""Tokens added to the maximum length that `_PADDING` gives."""
_TOKENS_PER_STACK = 10_000
"""Copying this many tokens costs about as much as one extra stack costs the next steps."""


class Entry:
    """The keys and values of one prefix, as a row of a stack."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], start: int) -> None:
        """Args: keys: per layer [key heads, tokens, width]; start: position of the first."""
        self.keys, self.values = keys, values
        self.start = start
        self.length = keys[0].shape[1]
        self.users = 0
        """Number of running samples with this prefix."""


class Stack:
    """Entries of similar length, in one tensor per layer."""

    def __init__(self, entries: list[Entry]) -> None:
        """Turns the entries' tensors into views of the stack's, so that nothing is stored twice."""
        self.entries = entries
        self.length = max(entry.length for entry in entries)
        self.keys = _stacked([entry.keys for entry in entries], self.length)
        self.values = _stacked([entry.values for entry in entries], self.length)


class Seats:
    """Tensors that say which rows attend to a stack's entries, built once per step.

    Each entry has as many seats as the fullest one; empty seats compute row 0 again.
    """

    def __init__(
        self,
        stack: Stack,
        rows_of: Sequence[Sequence[int]],
        positions: Tensor,
        device: torch.device,
    ) -> None:
        """Args: rows_of: the rows of each entry; positions: [rows] positions of the new tokens."""
        self.stack = stack
        self.most = max(len(rows) for rows in rows_of)
        filled = [[*rows, *[0] * (self.most - len(rows))] for rows in rows_of]
        self.rows = torch.tensor(filled, device=device).flatten()
        self._positions = positions[self.rows].view(-1, self.most)
        lengths = [entry.length for entry in stack.entries]
        self._hidden = visible_from(lengths, stack.length, device)
        starts = torch.tensor([entry.start for entry in stack.entries], device=device)
        self._key_positions = starts.unsqueeze(1) + torch.arange(stack.length, device=device)
        self._windows: dict[int, Tensor | None] = {}

    def partial(self, layer: int, query: Tensor, scoring: Scoring, window: int | None) -> Partial:
        """Attention of each seat over its entry.

        Args:
            query: [rows, heads, width]

        Returns:
            total [seats, heads, width], greatest and mass [seats, heads].
        """
        key, value = self.stack.keys[layer], self.stack.values[layer]
        heads = query.shape[1]
        bias = self._bias(window, heads // key.shape[1])
        part = attend_partly(self._seated(query, key), key, value, scoring, bias)
        return Partial(
            self._unseated(part.total, heads),
            self._unseated(part.greatest.unsqueeze(-1), heads).squeeze(-1),
            self._unseated(part.mass.unsqueeze(-1), heads).squeeze(-1),
        )

    def whole(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """Attention of seats that only attend to their entry: [seats, heads, width]."""
        key, value = self.stack.keys[layer], self.stack.values[layer]
        seated = self._seated(query, key)
        return self._unseated(
            attend_wholly(seated, key, value, scoring, self._hidden), query.shape[1]
        )

    def _seated(self, query: Tensor, key: Tensor) -> Tensor:
        """Arranges all queries that share an entry and a key head as rows of one product.

        Returns:
            [entries, key heads, seats of an entry x shared heads, width]
        """
        entries, key_heads = key.shape[:2]
        split = query[self.rows].view(entries, self.most, key_heads, -1, query.shape[-1])
        if self.most == 1:
            return split.squeeze(1)
        return split.transpose(1, 2).flatten(2, 3)

    def _unseated(self, found: Tensor, heads: int) -> Tensor:
        """Turns a result for `_seated` queries into [seats, heads, width]."""
        entries, key_heads, _, width = found.shape
        split = found.view(entries, key_heads, self.most, -1, width).transpose(1, 2)
        return split.reshape(-1, heads, width)

    def _bias(self, window: int | None, shared: int) -> Tensor | None:
        if window is None:
            return self._hidden
        if window not in self._windows:
            self._windows[window] = self._window_bias(window, shared)
        return self._windows[window]

    def _window_bias(self, window: int, shared: int) -> Tensor | None:
        """Bias [entries, 1, queries, keys], or the one without a window if all keys are in it."""
        distance = self._positions.unsqueeze(2) - self._key_positions.unsqueeze(1)
        outside = distance >= window
        if not bool(outside.any()):
            return self._hidden
        bias = torch.zeros(outside.shape, device=outside.device).masked_fill_(outside, -torch.inf)
        bias = bias.repeat_interleave(shared, dim=1).unsqueeze(1)
        return bias if self._hidden is None else bias + self._hidden


class StackSet:
    """The stacks of all prefixes that running samples attend to."""

    def __init__(self) -> None:
        self.stacks: list[Stack] = []

    def add(self, entries: Sequence[Entry]) -> None:
        """Adds entries, stacking those of similar length and number of users together."""
        if not entries:
            return
        fresh = _grouped(entries)
        every = [*(entry for stack in self.stacks for entry in stack.entries), *entries]
        best = _grouped(every)
        spared = len(self.stacks) + len(fresh) - len(best)
        if spared * _TOKENS_PER_STACK >= sum(entry.length for entry in every):
            self.stacks, fresh = [], best
        self.stacks.extend(Stack(group) for group in fresh)

    def prune(self) -> None:
        """Drops unused stacks, and the unused entries of stacks that are at most half used."""
        kept = []
        for stack in self.stacks:
            used = [entry for entry in stack.entries if entry.users]
            if used:
                kept.append(stack if 2 * len(used) > len(stack.entries) else Stack(used))
        self.stacks = kept

    def seat(
        self, entries_of: Sequence[Sequence[Entry]], positions: Tensor, device: torch.device
    ) -> list[Seats]:
        """Builds the `Seats` of each stack for one step.

        Args:
            entries_of: the entries that each row attends to.
        """
        rows_of: dict[int, list[int]] = {}
        for row, entries in enumerate(entries_of):
            for entry in entries:
                rows_of.setdefault(id(entry), []).append(row)
        return [
            Seats(stack, [rows_of.get(id(e), []) for e in stack.entries], positions, device)
            for stack in self.stacks
        ]


def memberships(
    entries_of: Sequence[Sequence[Entry]], seats: Sequence[Seats], device: torch.device
) -> Tensor:
    """The slots of each row's parts: [rows, parts].

    Slot ``row`` holds the row's own tokens, and the seats follow in order; the last slot is
    empty and fills up missing parts.
    """
    first: dict[int, int] = {}
    slot = len(entries_of)
    for seat in seats:
        for entry in seat.stack.entries:
            first[id(entry)] = slot
            slot += seat.most
    taken: dict[int, int] = {}
    table = []
    for row, entries in enumerate(entries_of):
        slots = [row]
        for entry in entries:
            slots.append(first[id(entry)] + taken.get(id(entry), 0))
            taken[id(entry)] = taken.get(id(entry), 0) + 1
        table.append(slots)
    parts = max(len(slots) for slots in table)
    return torch.tensor([[*slots, *[slot] * (parts - len(slots))] for slots in table]).to(device)


def _stacked(held: Sequence[list[Tensor]], length: int) -> list[Tensor]:
    """Stacks tensors per layer, [entries, key heads, length, width], and makes them views."""
    layers = []
    for layer, first in enumerate(held[0]):
        stacked = first.new_zeros(len(held), first.shape[0], length, first.shape[2])
        for row, tensors in zip(stacked, held, strict=True):
            view = row[:, : tensors[layer].shape[1]]
            view.copy_(tensors[layer])
            tensors[layer] = view
        layers.append(stacked)
    return layers


def _grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    groups: list[list[Entry]] = []
    for entry in sorted(entries, key=lambda entry: entry.length):
        if groups and _alike(groups[-1], entry):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _alike(group: list[Entry], entry: Entry) -> bool:
    if entry.length > _PADDING * group[0].length + _PADDING_TOKENS:
        return False
    users = [max(one.users, 1) for one in (*group, entry)]
    return max(users) <= 2 * min(users)
