"""Prefixes of running samples in padded tensors, so that one product serves many of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcot.models.generation.attention import Partial, Scoring, attend_partly, attend_wholly
from lmcot.models.generation.suffixes import visible_from

_PADDING = 1.5
"""The longest prefix of a stack may be so much longer than its shortest,"""
_PADDING_TOKENS = 16
"""and by so many tokens more."""
_TOKENS_PER_STACK = 10_000
"""A stack too many costs its rows' next steps about what it costs to copy so many tokens."""


class Entry:
    """One prefix: its keys and values as a row of a stack."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], start: int) -> None:
        """Args: keys: for each layer [key heads, tokens, width]; start: the first's position."""
        self.keys, self.values = keys, values
        self.start = start
        self.length = keys[0].shape[1]
        self.users = 0
        """Running samples behind it."""


class Stack:
    """Entries of about one length."""

    def __init__(self, entries: list[Entry]) -> None:
        """The entries' tensors become views of the stack's, so that nothing is held twice."""
        self.entries = entries
        self.length = max(entry.length for entry in entries)
        self.keys = _stacked([entry.keys for entry in entries], self.length)
        self.values = _stacked([entry.values for entry in entries], self.length)


class Seats:
    """Which rows attend to a stack's entries, as tensors: made once for all layers of a step.

    Each entry has as many seats as the fullest one; seats that nobody takes do row 0 over again.
    """

    def __init__(
        self,
        stack: Stack,
        rows_of: Sequence[Sequence[int]],
        positions: Tensor,
        device: torch.device,
    ) -> None:
        """Args: rows_of: for each entry its rows; positions: [rows] of the rows' new tokens."""
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
        """Each seat's attention over its entry.

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
        """Each seat's attention, if its entry is all that it attends to: [seats, heads, width]."""
        key, value = self.stack.keys[layer], self.stack.values[layer]
        seated = self._seated(query, key)
        return self._unseated(
            attend_wholly(seated, key, value, scoring, self._hidden), query.shape[1]
        )

    def _seated(self, query: Tensor, key: Tensor) -> Tensor:
        """All queries of an entry, of every head that shares a key head, as rows of one product.

        Returns:
            [entries, key heads, seats of an entry x shared heads, width]
        """
        entries, key_heads = key.shape[:2]
        split = query[self.rows].view(entries, self.most, key_heads, -1, query.shape[-1])
        if self.most == 1:
            return split.squeeze(1)
        return split.transpose(1, 2).flatten(2, 3)

    def _unseated(self, found: Tensor, heads: int) -> Tensor:
        """[seats, heads, width] of what belongs to `_seated`."""
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
        """[entries, 1, queries, keys], or what it is without a window if all is within it."""
        distance = self._positions.unsqueeze(2) - self._key_positions.unsqueeze(1)
        outside = distance >= window
        if not bool(outside.any()):
            return self._hidden
        bias = torch.zeros(outside.shape, device=outside.device).masked_fill_(outside, -torch.inf)
        bias = bias.repeat_interleave(shared, dim=1).unsqueeze(1)
        return bias if self._hidden is None else bias + self._hidden


class StackSet:
    """All prefixes that running samples attend to."""

    def __init__(self) -> None:
        self.stacks: list[Stack] = []

    def add(self, entries: Sequence[Entry]) -> None:
        """Takes up new entries, those of about one length and number of users together."""
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
        """Lets go of stacks that nobody uses, and of the others' unused halves."""
        kept = []
        for stack in self.stacks:
            used = [entry for entry in stack.entries if entry.users]
            if used:
                kept.append(stack if 2 * len(used) > len(stack.entries) else Stack(used))
        self.stacks = kept

    def seat(
        self, entries_of: Sequence[Sequence[Entry]], positions: Tensor, device: torch.device
    ) -> list[Seats]:
        """The tables of a step.

        Args:
            entries_of: for each row the entries that it attends to.
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
    """[rows, parts]: slots of each row's parts, where its own tokens are slot ``row``, and seats
    follow in their order; the last slot of all is empty and stands for missing parts."""
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
    """For each layer [entries, key heads, length, width]; what was held becomes views of it."""
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
