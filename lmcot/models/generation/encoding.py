"""Prompts of encoder-decoders, encoded once, with cross-attention keys and values made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lmcot.models.batches import pad_right
from lmcot.models.generation.stacks import Entry


def encode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, max_batch_tokens: int
) -> list[Entry]:
    """Cross-attention keys and values of each prompt, in batches of similar lengths."""
    entries: dict[int, Entry] = {}
    for batch in _batches([len(prompt) for prompt in prompts], max_batch_tokens):
        ids, mask = pad_right([prompts[index] for index in batch], pad_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = model.config.decoder_start_token_id
        # One decoder token makes the keys and values, whatever the names of the layers.
        model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=torch.full((len(batch), 1), start, device=ids.device),
            past_key_values=cache,
            use_cache=True,
        )
        layers = cache.cross_attention_cache.layers
        for row, index in enumerate(batch):
            length = len(prompts[index])
            keys = [layer.keys[row, :, :length] for layer in layers]
            entries[index] = Entry(keys, [layer.values[row, :, :length] for layer in layers], 0)
    return [entries[index] for index in range(len(prompts))]


class SourceStandIn:
    """Stand-in for the encoder, so that cross-attention keys are not computed at each step."""

    def __init__(self, model: PreTrainedModel) -> None:
        text = model.config.get_text_config(decoder=True)
        self.key = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
        self._hidden = torch.zeros(1, 1, text.hidden_size, dtype=model.dtype, device=model.device)
        self._layers: int = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
        self._biased = [
            module
            for module in model.get_decoder().modules()
            if getattr(module, "has_relative_attention_bias", False)
        ]

    def arguments(self) -> dict[str, Any]:
        """Arguments for the model besides the decoder's tokens."""
        cross = DynamicCache()
        for layer in range(self._layers):
            cross.update(self.key, self.key, layer)
            cross.layers[layer].keys = cross.layers[layer].values = self.key
        return {
            "encoder_outputs": BaseModelOutput(last_hidden_state=self._hidden),
            # The decoder's own cache only has to be empty.
            "past_key_values": EncoderDecoderCache(DynamicCache(), cross),
            "use_cache": True,
        }

    @contextmanager
    def biases(self, distances: int) -> Iterator[dict[int, Tensor]]:
        """Computes relative position biases and makes their modules return stand-ins.

        The modules themselves assume that tokens lie in order.

        Returns:
            Biases [heads, distances] by the identity of their stand-in.
        """
        made: dict[int, Tensor] = {}
        held = []  # keeps the stand-ins alive, so that their identities stay unique
        try:
            for module in self._biased:
                bias = module.compute_bias(1, distances, past_seen_tokens=distances - 1)
                stand_in = bias[..., :1]
                held.append(stand_in)
                made[id(stand_in)] = bias[0, :, 0].flip(-1)
                module.compute_bias = partial(_return, stand_in)
            yield made
        finally:
            for module in self._biased:
                vars(module).pop("compute_bias", None)


def _return(stand_in: Tensor, *_: object, **__: object) -> Tensor:
    return stand_in


def _batches(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Batches of indices by length, each within a number of tokens including padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and lengths[index] * (len(batch) + 1) > max_batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
