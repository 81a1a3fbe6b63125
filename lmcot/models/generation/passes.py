"""One forward pass over concatenated tokens, of rows being written and of sequences being read.

Every layer but attention treats tokens independently, so all tokens of a pass form one row
[1, tokens] without padding; only attention is replaced, through transformers' interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lmcot.models.generation.attention import (
    Partial,
    Scoring,
    attend,
    attend_partly,
    attend_wholly,
    join,
    merge,
)
from lmcot.models.generation.stacks import Entry, StackSet, memberships
from lmcot.models.generation.suffixes import SuffixCache, visible_from
from lmcot.models.generation.tree import TreeNode
from lmcot.models.generation.work import Row

NAME = "lmcot_tree"
"""Name of our attention in transformers; it has no mask function, so no masks are made."""

_active: ContextVar[ForwardPass] = ContextVar("forward_pass")


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``begin`` to ``end`` of a node, read in one pass."""

    node: TreeNode
    begin: int
    end: int
    source: Entry | None = None

    @property
    def positions(self) -> range:
        """Positions of the tokens in the sequence."""
        return range(self.node.start + self.begin, self.node.start + self.end)


class ForwardPass:
    """The attention of one pass, whose tokens are those of the rows, then of the segments."""

    def __init__(
        self,
        rows: Sequence[Row],
        positions: Sequence[int],
        segments: Sequence[Segment],
        suffixes: SuffixCache,
        prefixes: StackSet,
        sources: StackSet,
        device: torch.device,
    ) -> None:
        """Args: positions: positions of the new tokens of the rows."""
        self._rows = len(rows)
        self._segments = segments
        self._suffixes = suffixes
        self._device = device
        self.biases: dict[int, Tensor] = {}
        """Relative position biases [heads, distance] by the identity of their stand-in."""
        self.source_key: Tensor | None = None
        """Stand-in for the keys of cross-attention layers."""
        self.windows: set[int | None] = set()
        """Sliding windows used by the layers."""
        self._own_biases: dict[tuple[int | None, int | None], Tensor | None] = {}
        self._segment_biases: dict[tuple[int, int | None, int | None], Tensor | None] = {}
        if rows:
            suffixes.begin_step(device)
            self._lengths = [length + 1 for length in suffixes.lengths]
            at = torch.tensor(positions, device=device)
            held = [row.entries for row in rows]
            self._seats = prefixes.seat(held, at, device)
            self._members = memberships(held, self._seats, device) if self._seats else None
            read = [[row.source] for row in rows if row.source is not None]
            self._source_seats = sources.seat(read, at, device)
            # Slots are numbered after those of the rows' own tokens; here each row has one.
            self._source_slots = (
                memberships(read, self._source_seats, device)[:, 1] - len(rows) if read else None
            )

    @contextmanager
    def running(self, model: nn.Module, configs: Sequence[Any]) -> Iterator[None]:
        """Replaces the model's attention for one call."""
        before = [config._attn_implementation for config in configs]
        token = _active.set(self)
        for config in configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            _active.reset(token)
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name
        if self._rows:
            self._suffixes.end_step()

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        window: int | None,
        bias: int | None,
    ) -> Tensor:
        """Self-attention of all tokens in the pass; stores their keys and values.

        Args:
            query: [heads, tokens, width]
            key, value: [key heads, tokens, width]
            bias: identity of the stand-in for the relative position bias.

        Returns:
            [tokens, heads, value width]
        """
        outputs = []
        if self._rows:
            rows = [x[:, : self._rows].transpose(0, 1) for x in (query, key, value)]
            written = self._written(layer, rows[0], rows[1], rows[2], scoring, window, bias)
            outputs.append(written.to(query.dtype))
        offset = self._rows
        for number, segment in enumerate(self._segments):
            part = slice(offset, offset + segment.end - segment.begin)
            keys, values = _keep(segment, layer, key[:, part], value[:, part])
            seen = self._segment_bias(number, segment, window, bias)
            whole = keys.shape[1] == part.stop - part.start
            outputs.append(
                attend(
                    query[:, part],
                    keys,
                    values,
                    scoring,
                    causal=whole and seen is None,
                    bias=seen,
                ).transpose(0, 1)
            )
            offset = part.stop
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def cross_attention(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """Attention of all tokens over their encoded prompts: [tokens, heads, width]."""
        outputs = []
        if self._rows:
            rows = query[:, : self._rows].transpose(0, 1)
            seated = [seat.whole(layer, rows, scoring) for seat in self._source_seats]
            assert self._source_slots is not None
            outputs.append(torch.cat(seated)[self._source_slots])
        offset = self._rows
        for segment in self._segments:
            part = slice(offset, offset + segment.end - segment.begin)
            assert segment.source is not None
            keys, values = segment.source.keys[layer], segment.source.values[layer]
            outputs.append(
                attend(query[:, part], keys, values, scoring, causal=False).transpose(0, 1)
            )
            offset = part.stop
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _written(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        window: int | None,
        bias: int | None,
    ) -> Tensor:
        """Attention of rows over their prefixes and their own tokens: [rows, heads, width]."""
        rows, heads, width = query.shape
        keys, values = self._suffixes.write(layer, key, value)
        grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
        own_bias = self._own_bias(window, bias)
        if self._members is None:
            return attend_wholly(grouped, keys, values, scoring, own_bias).reshape(rows, heads, -1)
        part = attend_partly(grouped, keys, values, scoring, own_bias)
        own = Partial(
            part.total.reshape(rows, heads, -1),
            part.greatest.reshape(rows, heads),
            part.mass.reshape(rows, heads),
        )
        seated = [seat.partial(layer, query, scoring, window) for seat in self._seats]
        return merge(join([own, *seated]), self._members)

    def _own_bias(self, window: int | None, bias: int | None) -> Tensor | None:
        """Bias of rows over their own tokens; broadcasts to [rows, key heads, shared, keys]."""
        longest = max(self._lengths)
        if window is not None and window >= longest:
            window = None
        if (window, bias) not in self._own_biases:
            if window is None and bias is None:
                made = visible_from(self._lengths, longest, self._device)
            else:
                last = torch.tensor(self._lengths, device=self._device).unsqueeze(1) - 1
                distance = last - torch.arange(longest, device=self._device)
                made = self._by_distance(distance, window, bias).transpose(0, 1).unsqueeze(2)
            self._own_biases[window, bias] = made
        return self._own_biases[window, bias]

    def _by_distance(self, distance: Tensor, window: int | None, bias: int | None) -> Tensor:
        """Bias [heads or 1, queries, keys] from each key's distance before each query.

        It hides keys after the query and keys outside the window.
        """
        made = torch.zeros(1, *distance.shape, device=self._device)
        if bias is not None:
            made = self.biases[bias][:, distance.clamp_min(0)].float()
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return made.masked_fill(hidden, -torch.inf)

    def _segment_bias(
        self, number: int, segment: Segment, window: int | None, bias: int | None
    ) -> Tensor | None:
        """Bias of a segment; None if plain causal attention over its own tokens is enough."""
        end = segment.positions.stop
        if window is not None and window >= end:
            window = None
        if (number, window, bias) not in self._segment_biases:
            made: Tensor | None = None
            if len(segment.positions) != end or window is not None or bias is not None:
                at = torch.arange(segment.positions.start, end, device=self._device)
                distance = at.unsqueeze(1) - torch.arange(end, device=self._device)
                made = self._by_distance(distance, window, bias)
            self._segment_biases[number, window, bias] = made
        return self._segment_biases[number, window, bias]


def _keep(segment: Segment, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Stores a segment's keys and values; returns all visible ones [key heads, seen, width]."""
    node = segment.node
    if layer == len(node.keys):
        node.keys.append(key.new_empty(key.shape[0], len(node.tokens), key.shape[2]))
        node.values.append(value.new_empty(value.shape[0], len(node.tokens), value.shape[2]))
    node.keys[layer][:, segment.begin : segment.end] = key
    node.values[layer][:, segment.begin : segment.end] = value
    above = node.path()[:-1]
    own = node.keys[layer][:, : segment.end], node.values[layer][:, : segment.end]
    if not above:
        return own
    return (
        torch.cat([*(one.keys[layer] for one in above), own[0]], dim=1),
        torch.cat([*(one.values[layer] for one in above), own[1]], dim=1),
    )


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of the running pass, with the signature of transformers' interface.

    Args:
        query: [1, heads, tokens, width]
        key, value: [1, key heads, tokens, width]

    Returns:
        [1, tokens, heads, width], and None for the weights.
    """
    active = _active.get()
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    layer = int(getattr(module, "layer_idx"))  # noqa: B009 - nn.Module's attributes have no type
    if key is active.source_key:
        return active.cross_attention(layer, query[0], scoring).unsqueeze(0), None
    active.windows.add(sliding_window)
    bias = None if position_bias is None else id(position_bias)
    output = active.attention(layer, query[0], key[0], value[0], scoring, sliding_window, bias)
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, tree_attention)
