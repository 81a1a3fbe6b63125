"""Keys and values of the tokens that running samples have written, in one tensor per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FEWEST_ROWS, _FEWEST_TOKENS = 8, 64


class SuffixCache:
    """The cache of the rows' own tokens; rows are dense from 0, so that a step uses a view.

    Tensors are allocated ahead, doubled when they are too small, and freed when the last row
    leaves. Values after a row's own tokens are masked, but must be finite, since a mask does not
    remove NaN or infinity.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Tokens of each row."""
        self._capacity = (0, 0)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._row_index = self._column_index = torch.empty(0, dtype=torch.long)
        self._even = True

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def add(self, rows: int) -> None:
        """Adds rows at the end."""
        for tensor in (*self._keys, *self._values):
            tensor[self.rows : self.rows + rows] = 0
        self.lengths.extend([0] * rows)

    def begin_with(self, row: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Starts the only row with tokens that were already read.

        Args:
            keys, values: per layer [key heads, tokens, width].
        """
        if self.rows != 1 or self.lengths[row]:
            raise ValueError("there are other rows, or the row has begun")
        length = keys[0].shape[1]
        self._capacity = (_FEWEST_ROWS, _doubled(_FEWEST_TOKENS, length + 1))
        self._keys = [self._new(key.transpose(0, 1)) for key in keys]
        self._values = [self._new(value.transpose(0, 1)) for value in values]
        for held, read in ((self._keys, keys), (self._values, values)):
            for tensor, one in zip(held, read, strict=True):
                tensor[row, :, :length] = one
        self.lengths[row] = length

    def remove(self, row: int) -> None:
        """Removes a row; the last row takes its place."""
        length = self.lengths.pop()
        last = len(self.lengths)
        if row != last:
            self.lengths[row] = length
            for tensor in (*self._keys, *self._values):
                if last < len(tensor):
                    tensor[row] = tensor[last]
                elif row < len(tensor):  # the last row has not begun, so it has no room yet
                    tensor[row] = 0
        if not self.lengths:
            self._keys, self._values, self._capacity = [], [], (0, 0)

    def begin_step(self, device: torch.device) -> None:
        """Makes room for one more token in each row."""
        rows, tokens = self._capacity
        needed = max(self.lengths) + 1
        if self.rows > rows or needed > tokens:
            self._capacity = (
                _doubled(max(rows, _FEWEST_ROWS), self.rows),
                _doubled(max(tokens, _FEWEST_TOKENS), needed),
            )
            self._keys = [self._grown(key) for key in self._keys]
            self._values = [self._grown(value) for value in self._values]
        self._even = min(self.lengths) == max(self.lengths)
        self._row_index = torch.arange(self.rows, device=device)
        self._column_index = torch.tensor(self.lengths, device=device)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the new token of each row.

        Args:
            key: [rows, key heads, width]
            value: [rows, key heads, value width]

        Returns:
            views [rows, key heads, longest, width] of all keys and values; those after the
            tokens of a shorter row are meaningless.
        """
        if layer == len(self._keys):
            self._keys.append(self._new(key))
            self._values.append(self._new(value))
        held = self._keys[layer], self._values[layer]
        longest = max(self.lengths) + 1
        for tensor, new in zip(held, (key, value), strict=True):
            if self._even:
                tensor[: self.rows, :, longest - 1] = new
            else:
                tensor[self._row_index, :, self._column_index] = new
        return held[0][: self.rows, :, :longest], held[1][: self.rows, :, :longest]

    def end_step(self) -> None:
        """Adds the new tokens to the lengths."""
        self.lengths = [length + 1 for length in self.lengths]

    def _new(self, like: Tensor) -> Tensor:
        rows, tokens = self._capacity
        return like.new_zeros(rows, like.shape[1], tokens, like.shape[2])

    def _grown(self, old: Tensor) -> Tensor:
        rows, tokens = self._capacity
        new = old.new_zeros(rows, old.shape[1], tokens, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size


def visible_from(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor | None:
    """Bias [rows, 1, 1, longest] that hides keys beyond each length; None if there are none."""
    if min(lengths) == longest:
        return None
    held = torch.tensor(lengths, device=device).unsqueeze(1)
    hidden = torch.arange(longest, device=device) >= held
    bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    return bias.view(len(lengths), 1, 1, longest)
