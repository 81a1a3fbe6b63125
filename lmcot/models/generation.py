"""Plain batched decoding with a random number generator per sample.

One path for rollouts and for the frozen LM, causal and sequence-to-sequence. A sample draws one
uniform number per position from its own generator and inverts the cumulative distribution with
it, so that what it draws does not depend on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from lmcot.models.batches import pad_left, pad_right


@dataclass(frozen=True, slots=True)
class Generated:
    """One sampled sequence."""

    response_ids: tuple[int, ...]
    """With the EOS token where there was one."""
    logprobs: tuple[float, ...]
    """Natural log, of each token, under the distribution that it was drawn from."""
    finish_reason: Literal["eos", "length", "stop"]


@torch.inference_mode()
def generate_unit(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    eos_ids: frozenset[int],
    pad_id: int,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[Generated]:
    """Decodes one sequence for each prompt, all in one batch.

    The distribution is the model's at ``temperature``, with nothing cut off; at temperature 0
    decoding is greedy and log-probabilities are those of temperature 1.

    Args:
        prompts: token ids of each prompt; for an encoder-decoder the encoder's input.
        seeds: one for each prompt; unused when greedy.
        stop: told the tokens so far of one sequence, says whether it ends there.
    """
    if not prompts:
        return []
    uniforms = _uniforms(seeds, max_new_tokens)
    decoder = _Decoder(model, prompts, pad_id)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    reasons: list[Literal["eos", "length", "stop"] | None] = [None] * len(prompts)
    logits = decoder.start()
    for position in range(max_new_tokens):
        chosen, chosen_logprobs = _pick(logits, temperature, uniforms[:, position])
        for row, (token, logprob) in enumerate(
            zip(chosen.tolist(), chosen_logprobs.tolist(), strict=True)
        ):
            if reasons[row] is not None:
                continue
            tokens[row].append(token)
            logprobs[row].append(logprob)
            if token in eos_ids:
                reasons[row] = "eos"
            elif stop is not None and stop(tokens[row]):
                reasons[row] = "stop"
        if all(reasons) or position + 1 == max_new_tokens:
            break
        logits = decoder.step(chosen)
    return [
        Generated(tuple(t), tuple(p), reason or "length")
        for t, p, reason in zip(tokens, logprobs, reasons, strict=True)
    ]


def _uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """[rows, length] numbers in [0, 1), each row from a generator of its own (on the CPU)."""
    return torch.stack(
        [
            torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    )


def _pick(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row of ``logits`` [rows, vocabulary], and its log-probability."""
    scores = logits.float() / (temperature or 1.0)
    logprobs = torch.log_softmax(scores, dim=-1)
    if temperature == 0:
        chosen = logprobs.argmax(dim=-1)
    else:
        # In float64, for the rounding of a sum over the vocabulary must not favour its end.
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        target = uniform.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        chosen = chosen.clamp_max(logits.shape[-1] - 1)
    return chosen, logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


class _Decoder:
    """Steps a model of either architecture, with its key-value cache."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
    ) -> None:
        self.model = model
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        pad = pad_right if self.encoder_decoder else pad_left
        ids, mask = pad(prompts, pad_id)
        self.ids, self.mask = ids.to(model.device), mask.to(model.device)
        self.extra: dict[str, Any] = {}
        if self.encoder_decoder:
            encoder = model.get_encoder()
            self.extra["encoder_outputs"] = encoder(input_ids=self.ids, attention_mask=self.mask)
            self.cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        else:
            self.cache = DynamicCache(config=model.config)

    def start(self) -> Tensor:
        """Logits of the first new token: [rows, vocabulary]."""
        if self.encoder_decoder:
            start = self.model.config.decoder_start_token_id
            return self.step(torch.full((self.ids.shape[0],), start, device=self.ids.device))
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.next_position = positions[:, -1:] + 1
        return output.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token in each row: [rows, vocabulary]."""
        column = tokens.unsqueeze(-1)
        if self.encoder_decoder:
            output = self.model(
                decoder_input_ids=column,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **self.extra,
            )
            return output.logits[:, -1]
        self.mask = torch.cat([self.mask, torch.ones_like(column, dtype=self.mask.dtype)], dim=-1)
        output = self.model(
            input_ids=column,
            attention_mask=self.mask,
            position_ids=self.next_position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.next_position = self.next_position + 1
        return output.logits[:, -1]
