"""Writes with the weights that are being trained, by a copy of the model beside the engine's.

The engine's own model would not do: at ZeRO stage 3 its parameters are partitioned, and with
gradient checkpointing it keeps no keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lmcot.config import PolicySettings
from lmcot.models.adapters import add_adapters
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import SampleRequest
from lmcot.models.sources import eos_ids, load_model
from lmcot.records import Failure


class Writer:
    """A copy of the policy that writes greedily."""

    def __init__(self, source: str, policy: PolicySettings) -> None:
        """Args: source: of the model that the stage began with."""
        model, self._tokenizer = load_model(source, policy.dtype)
        if policy.lora is not None:
            model = add_adapters(model, policy.lora, seed=0).eval()
        self._model = model
        self._engine = GenerationEngine(model, pad_id=self._tokenizer.pad_token_id)

    @torch.no_grad()
    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the trained tensors, by their names in the model."""
        own = dict(self._model.named_parameters())
        for name, tensor in tensors:
            own[name].copy_(tensor)
        self._engine.weights_changed()

    def write(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """A greedy text for each prompt; where there is none, why, in brackets."""
        ends = eos_ids(self._model, self._tokenizer)
        requests = [
            SampleRequest(prompt, [0], max_new_tokens, temperature=0.0, eos_ids=ends)
            for prompt in prompts
        ]
        texts = []
        for found in self._engine.sample(requests):
            if isinstance(found, Failure):
                texts.append(f"[{found.reason}]")
            else:
                ids = found[0].response_ids
                texts.append(self._tokenizer.decode(ids, skip_special_tokens=True).strip())
        return texts
