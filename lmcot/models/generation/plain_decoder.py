"""Decodes batch by batch with a model's own attention and cache, if they cannot be replaced."""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from lmcot.models.batches import pad_left, pad_right
from lmcot.models.generation.requests import SampleRequest, tokens_after
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


class PlainDecoder:
    """Decodes padded batches, reading the prompt for each sample; new tasks wait for the next."""

    def __init__(self, model: PreTrainedModel, *, pad_id: int, max_batch_tokens: int) -> None:
        self.model = model
        self.rows: list[Row] = []
        self.pad_id = pad_id
        self._max_batch_tokens = max_batch_tokens
        self._encoder_decoder = bool(model.config.is_encoder_decoder)
        self._start_id = model.config.decoder_start_token_id if self._encoder_decoder else None
        taken = inspect.signature(model.forward).parameters
        # Models with ALiBi take no position ids, and recurrent ones no key-value cache.
        self._takes_positions = "position_ids" in taken
        self.takes_cache = "past_key_values" in taken
        self._waiting: list[Task] = []
        self._to_score: list[Sequence] = []
        self._batch: _Batch | None = None

    def fits(self, task: Task) -> bool:
        """Whether a task fits into the next batch."""
        if self._batch is not None or self._to_score:
            return False
        tasks = [*self._waiting, task]
        scores = [not isinstance(one.request, SampleRequest) for one in tasks]
        if any(scores) and not all(scores):
            return False
        longest = max(len(one.request.prompt_ids) + tokens_after(one.request) for one in tasks)
        rows = sum(_rows_of(one) for one in tasks)
        return len(tasks) == 1 or longest * rows <= self._max_batch_tokens

    def admit(self, task: Task) -> None:
        """Adds a task to the next batch."""
        self._waiting.append(task)

    def forward(self) -> Logits:
        """Runs one pass of the model."""
        if self._batch is None:
            self._begin()
        if self._to_score:
            return self._score()
        assert self._batch is not None
        values = self._batch.step([row.next_token for row in self._batch.rows])
        alive = {id(row) for row in self.rows}
        kept = [index for index, row in enumerate(self._batch.rows) if id(row) in alive]
        return Logits(values[kept], [self._batch.rows[index] for index in kept], [])

    def spawn(self, sequence: Sequence, rows: list[Row]) -> None:
        """Always raises, since rows begin with their batch."""
        raise AssertionError("rows of a plain batch begin with it")

    def remove(self, row: Row) -> None:
        """Removes a finished row, which is still computed until its batch ends."""
        self.rows.remove(row)
        if not self.rows:
            self._batch = None

    def release(self, task: Task) -> None:
        """Drops a finished or cancelled task."""
        for row in [row for row in self.rows if row.task is task]:
            self.remove(row)
        self._waiting = [one for one in self._waiting if one is not task]
        self._to_score = [one for one in self._to_score if one.task is not task]

    def clear(self) -> None:
        """Does nothing, since no prefixes are kept."""

    def _begin(self) -> None:
        tasks, self._waiting = self._waiting, []
        for task in tasks:
            if isinstance(task.request, SampleRequest):
                self.rows.extend(make_rows(task, self._start_id or 0))
            else:
                task.sequences = make_sequences(task, self._start_id)
                self._to_score.extend(task.sequences)
        if self.rows:
            self._batch = _Batch(self, self.rows)

    def _score(self) -> Logits:
        sequences, self._to_score = self._to_score, []
        lengths = [len(one.tokens) - one.wanted_from for one in sequences]
        wanted = [
            Wanted(one, one.wanted_from, n) for one, n in zip(sequences, lengths, strict=True)
        ]
        if self._encoder_decoder:
            ids, mask = pad_right([one.task.request.prompt_ids for one in sequences], self.pad_id)
            # Padding follows the decoder's tokens, so causal attention does not see it.
            decoder, _ = pad_right([one.tokens for one in sequences], self.pad_id)
            inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}
        else:
            decoder, mask = pad_left([one.tokens for one in sequences], self.pad_id)
            inputs = {"input_ids": decoder, "attention_mask": mask, **self.positions(mask)}
        where: list[list[int]] = [[], []]
        for row, (one, length) in enumerate(zip(sequences, lengths, strict=True)):
            end = len(one.tokens) if self._encoder_decoder else decoder.shape[1]
            where[0].extend([row] * length)
            where[1].extend(range(end - length, end))
        model: Any = self.model
        with output_at(model.get_output_embeddings(), torch.tensor(where, device=model.device)):
            placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            values: Tensor = model(**placed, use_cache=False).logits[0]
        return Logits(values, [], wanted)

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Position ids for prompts padded on the left, if the model takes them."""
        return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if self._takes_positions else {}


class _Batch:
    """Rows that begin together and use the model's own cache."""

    def __init__(self, decoder: PlainDecoder, rows: Seq[Row]) -> None:
        self.rows = list(rows)
        self._decoder = decoder
        self._model: Any = decoder.model
        self._encoder_decoder = bool(self._model.config.is_encoder_decoder)
        prompts = [row.request.prompt_ids for row in rows]
        pad = pad_right if self._encoder_decoder else pad_left
        ids, mask = pad(prompts, decoder.pad_id)
        self._ids, self._mask = ids.to(self._model.device), mask.to(self._model.device)
        self._extra: dict[str, Any] = {}
        self._cache: Any
        self._begun = self._encoder_decoder
        if self._encoder_decoder:
            encoder = self._model.get_encoder()
            self._extra["encoder_outputs"] = encoder(input_ids=self._ids, attention_mask=self._mask)
            self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        else:
            self._cache = DynamicCache(config=self._model.config)

    def step(self, tokens: list[int]) -> Tensor:
        """Logits after one more token in each row: [rows, vocabulary]."""
        column = torch.tensor(tokens, device=self._model.device).unsqueeze(-1)
        shared = {"past_key_values": self._cache, "use_cache": True}
        if not self._decoder.takes_cache:
            shared = {"use_cache": False}
        if self._encoder_decoder:
            output = self._model(
                decoder_input_ids=column, attention_mask=self._mask, **shared, **self._extra
            )
        else:
            if self._begun:
                ones = torch.ones_like(column, dtype=self._mask.dtype)
                self._mask = torch.cat([self._mask, ones], dim=-1)
            positions = self._decoder.positions(self._mask)
            if self._begun and not self._decoder.takes_cache:
                self._ids = torch.cat([self._ids, column], dim=-1)  # every token is read again
            ids = column if self._begun and self._decoder.takes_cache else self._ids
            output = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                logits_to_keep=1,
                **{name: tensor[:, -ids.shape[1] :] for name, tensor in positions.items()},
                **shared,
            )
        self._begun = True
        logits: Tensor = output.logits[:, -1]
        return logits


def _rows_of(task: Task) -> int:
    request = task.request
    return len(request.seeds if isinstance(request, SampleRequest) else request.continuations)
