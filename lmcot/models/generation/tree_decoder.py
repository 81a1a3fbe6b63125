"""Decodes with a prefix tree: a shared prefix is read once and attended to in one product."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcot.models.generation.encoding import SourceStandIn, encode
from lmcot.models.generation.passes import ForwardPass, Segment
from lmcot.models.generation.requests import SampleRequest
from lmcot.models.generation.stacks import Entry, StackSet
from lmcot.models.generation.suffixes import SuffixCache
from lmcot.models.generation.tree import PrefixTree, TreeNode
from lmcot.models.generation.work import (
    Logits,
    Row,
    Sequence,
    Task,
    Wanted,
    make_rows,
    make_sequences,
)
from lmcot.models.output_layer import output_at

_LEAST_READING = 64
"""Minimum tokens of waiting prompts to read per pass, whatever the number of rows."""
_MOST_WANTED = 512
"""Maximum rows of logits per pass for tokens it reads, since a vocabulary is large."""


class TreeDecoder:
    """Decodes with shared prefixes; rows are dense and in the order of the suffix cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        max_batch_tokens: int,
        max_cached_tokens: int,
        keep_prefix_tokens: int,
    ) -> None:
        self.model = model
        self._pad_id = pad_id
        self._max_batch_tokens = max_batch_tokens
        self._max_cached_tokens = max_cached_tokens
        self._encoder_decoder = bool(model.config.is_encoder_decoder)
        self._start_id: int | None = (
            model.config.decoder_start_token_id if self._encoder_decoder else None
        )
        self._stand_in = SourceStandIn(model) if self._encoder_decoder else None
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        self._configs: list[Any] = list({id(config): config for config in configs}.values())
        self._tree = PrefixTree(keep_prefix_tokens)
        self._suffixes = SuffixCache()
        self._prefixes, self._sources = StackSet(), StackSet()
        self.rows: list[Row] = []
        self._to_encode: list[Task] = []
        self._reading: list[Sequence] = []
        self._new_entries: list[Entry] = []
        self._new_sources: list[Entry] = []
        self._reserved: dict[Task, int] = {}
        self.windows: set[int | None] = set()
        """Sliding windows used by the model's layers."""

    def fits(self, task: Task) -> bool:
        """Whether a task's tokens and samples fit; a task alone always does."""
        if not self._reserved:
            return True
        rows = sum(_samples(one) for one in (*self._reserved, task))
        if rows > self._max_batch_tokens:
            return False
        held = self._tree.tokens - self._tree.idle_tokens + sum(self._reserved.values())
        prompt = tuple(task.request.prompt_ids)
        shared = 0 if self._encoder_decoder else self._tree.shared(prompt, len(prompt) - 1)
        needed = len(prompt) - shared + self._to_write(task)
        return held + needed <= self._max_cached_tokens

    def admit(self, task: Task) -> None:
        """Reserves room for a task and queues its prompt for reading."""
        self._reserved[task] = self._to_write(task)
        if self._encoder_decoder:
            self._reserved[task] += len(task.request.prompt_ids)
            self._to_encode.append(task)
            return
        task.sequences = make_sequences(task, None)
        for sequence in task.sequences:
            sequence.leaf = self._tree.insert(sequence.tokens, sequence.wanted_from)
        self._reading.extend(task.sequences)

    def forward(self) -> Logits:
        """Runs one pass over all rows and as many waiting tokens as fit."""
        if self._to_encode:
            self._encode()
        self._settle()
        segments, wanted, where = self._plan()
        ids = [row.next_token for row in self.rows]
        positions = [
            row.start + written
            for row, written in zip(self.rows, self._suffixes.lengths, strict=True)
        ]
        for segment in segments:
            ids.extend(segment.node.tokens[segment.begin : segment.end])
            positions.extend(segment.positions)
        running = ForwardPass(
            self.rows,
            positions[: len(self.rows)],
            segments,
            self._suffixes,
            self._prefixes,
            self._sources,
            self.model.device,
        )
        values = self._run(running, ids, positions, [*range(len(self.rows)), *where])
        self.windows |= running.windows
        for segment in segments:
            segment.node.done = segment.end
        self._reading = [one for one in self._reading if not _is_read(one)]
        return Logits(values, list(self.rows), wanted)

    def spawn(self, sequence: Sequence, rows: list[Row]) -> None:
        """Adds rows that continue a sequence that has been read."""
        assert sequence.leaf is not None
        path = sequence.leaf.path()
        if len(rows) == 1 and len(self._reserved) == 1:
            # No other row shares the prompt; as part of the row's own tokens it needs no merge.
            self._place(rows)
            layers = range(len(path[0].keys))
            self._suffixes.begin_with(
                0,
                [torch.cat([node.keys[layer] for node in path], 1) for layer in layers],
                [torch.cat([node.values[layer] for node in path], 1) for layer in layers],
            )
            return
        entries = [self._entry(node) for node in path]
        for row in rows:
            row.entries, row.start = entries, len(sequence.tokens)
            for entry in entries:
                entry.users += 1
        self._place(rows)

    def remove(self, row: Row) -> None:
        """Removes a finished row; the last one takes its place."""
        index = self.rows.index(row)
        self._suffixes.remove(index)
        self.rows[index] = self.rows[-1]
        self.rows.pop()
        for entry in (*row.entries, *([row.source] if row.source else [])):
            entry.users -= 1

    def release(self, task: Task) -> None:
        """Frees all that is held for a finished or cancelled task."""
        for row in [row for row in self.rows if row.task is task]:
            self.remove(row)
        self._to_encode = [one for one in self._to_encode if one is not task]
        self._reading = [one for one in self._reading if one.task is not task]
        for sequence in task.sequences:
            if sequence.leaf is not None and sequence.source is None:
                self._tree.release(sequence.leaf)
        self._reserved.pop(task, None)

    def clear(self) -> None:
        """Drops the prefixes kept for later tasks."""
        self._tree.clear()

    def _to_write(self, task: Task) -> int:
        request = task.request
        if isinstance(request, SampleRequest):
            return len(request.seeds) * request.max_new_tokens
        return sum(len(continuation) for continuation in request.continuations)

    def _encode(self) -> None:
        tasks, self._to_encode = self._to_encode, []
        prompts = [task.request.prompt_ids for task in tasks]
        entries = encode(self.model, prompts, self._pad_id, self._max_batch_tokens)
        assert self._start_id is not None
        for task, entry in zip(tasks, entries, strict=True):
            if isinstance(task.request, SampleRequest):
                rows = make_rows(task, self._start_id)
                for row in rows:
                    row.source = entry
                entry.users = len(rows)
                self._new_sources.append(entry)
                self._place(rows)
                continue
            task.sequences = make_sequences(task, self._start_id)
            for sequence in task.sequences:
                sequence.source = entry
                sequence.leaf = TreeNode(sequence.tokens, 0, None)
            self._reading.extend(task.sequences)

    def _settle(self) -> None:
        """Adds the prefixes of new rows and drops unused ones."""
        for stacks, new in (
            (self._prefixes, self._new_entries),
            (self._sources, self._new_sources),
        ):
            stacks.prune()
            stacks.add([entry for entry in new if entry.users])
            new.clear()

    def _plan(self) -> tuple[list[Segment], list[Wanted], list[int]]:
        """Chooses what this pass reads: first come, first served, within the token budget.

        Returns:
            segments; the wanted logits; the indices of their tokens in the pass.
        """
        budget = max(self._max_batch_tokens - len(self.rows), _LEAST_READING)
        logits = _MOST_WANTED
        done: dict[TreeNode, int] = {}
        segments: list[Segment] = []
        wanted: list[Wanted] = []
        where: list[int] = []
        offset = len(self.rows)
        for sequence in self._reading:
            assert sequence.leaf is not None
            for node in sequence.leaf.path():
                begin = done.get(node, node.done)
                # Only the last node, the sequence's own, holds tokens whose logits are wanted.
                first = max(begin, sequence.wanted_from - node.start)
                end = min(len(node.tokens), begin + budget, first + logits)
                if end > begin:
                    segments.append(Segment(node, begin, end, sequence.source))
                    done[node] = end
                    budget -= end - begin
                    if end > first:
                        wanted.append(Wanted(sequence, node.start + first, end - first))
                        where.extend(range(offset + first - begin, offset + end - begin))
                        logits -= end - first
                    offset += end - begin
                if done.get(node, node.done) < len(node.tokens):
                    return segments, wanted, where
        return segments, wanted, where

    def _run(
        self, running: ForwardPass, ids: list[int], positions: list[int], where: list[int]
    ) -> Tensor:
        """Runs the model and returns logits at ``where``: [len(where), vocabulary]."""
        model: Any = self.model
        device = model.device
        tokens = torch.tensor([ids], device=device)
        at = torch.tensor([[0] * len(where), where], dtype=torch.long, device=device)
        with ExitStack() as stack:
            stack.enter_context(running.running(model, self._configs))
            stack.enter_context(output_at(model.get_output_embeddings(), at))
            if self._stand_in is None:
                output = model(
                    input_ids=tokens,
                    position_ids=torch.tensor([positions], device=device),
                    use_cache=False,
                )
            else:
                running.source_key = self._stand_in.key
                running.biases = stack.enter_context(self._stand_in.biases(max(positions) + 1))
                output = model(decoder_input_ids=tokens, **self._stand_in.arguments())
        logits: Tensor = output.logits[0]
        return logits

    def _entry(self, node: TreeNode) -> Entry:
        if node.entry is None or not node.entry.users:
            node.entry = Entry(node.keys, node.values, node.start)
            self._new_entries.append(node.entry)
        return node.entry

    def _place(self, rows: list[Row]) -> None:
        self.rows.extend(rows)
        self._suffixes.add(len(rows))


def _samples(task: Task) -> int:
    return len(task.request.seeds) if isinstance(task.request, SampleRequest) else 0


def _is_read(sequence: Sequence) -> bool:
    assert sequence.leaf is not None
    return sequence.leaf.done == len(sequence.leaf.tokens)
