"""Tests on made-up tokens whether the attention of a model can be replaced by ours."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcot.models.generation.requests import SampleRequest
from lmcot.models.generation.tree import SHORTEST_SHARED
from lmcot.models.generation.tree_decoder import TreeDecoder
from lmcot.models.generation.work import Task, make_rows

_WINDOWED = {"sliding_attention"}
_KNOWN = {"full_attention", *_WINDOWED}
_SHARED, _WRITTEN = SHORTEST_SHARED + 8, 2

Tokens = tuple[int, ...]


def refusal(decoder: TreeDecoder) -> str | None:
    """The reason why the attention cannot be replaced; None if it can.

    The decoder reads prompts of which two share a prefix, writes two samples for each, and
    compares all logits with the model's own.
    """
    model = decoder.model
    text = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if not kinds <= _KNOWN:
        return f"it has layers of the kind {sorted(kinds - _KNOWN)[0]}"
    generator = torch.Generator().manual_seed(0)

    def made_up(length: int) -> Tokens:
        tokens = torch.randint(text.vocab_size, (length,), generator=generator)
        return tuple(int(token) for token in tokens)

    shared = made_up(_SHARED)
    prompts = [shared + made_up(3), shared + made_up(5), made_up(4)]
    written = [[made_up(_WRITTEN), made_up(_WRITTEN)] for _ in prompts]
    try:
        ours = _ours(decoder, prompts, written)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        return f"its layers do not take our attention ({type(error).__name__}: {error})"
    windowed = (
        bool(kinds & _WINDOWED)
        if hasattr(text, "layer_types")
        else bool(getattr(text, "sliding_window", None))
    )
    if windowed and decoder.windows <= {None}:
        return "its layers do not tell their sliding window"
    theirs = _theirs(model, prompts, written)
    # The difference that rounding may cause, as a share of the logits' spread.
    # Thirty bfloat16 layers reach 5e-2 (SmolLM2).
    tolerance = 1e-4 if model.dtype == torch.float32 else 1e-1
    difference = float(
        (ours.float() - theirs.float()).square().mean().sqrt() / theirs.float().std()
    )
    if difference < tolerance:
        return None
    return f"its logits on our attention differ from its own by {difference:.1e} of their spread"


@torch.inference_mode()
def _ours(decoder: TreeDecoder, prompts: list[Tokens], written: list[list[Tokens]]) -> Tensor:
    """Logits of the decoder: [prompts, samples, 1 + written, vocabulary]."""
    tasks = [
        Task(-1 - number, SampleRequest(prompt, seeds=[0] * len(samples), max_new_tokens=9))
        for number, (prompt, samples) in enumerate(zip(prompts, written, strict=True))
    ]
    try:
        for task in tasks:
            decoder.admit(task)
        found = decoder.forward()
        at = {id(row): [values] for row, values in zip(found.rows, found.values, strict=False)}
        for wanted, values in zip(found.wanted, found.values[len(found.rows) :], strict=True):
            rows = make_rows(wanted.sequence.task, 0)
            decoder.spawn(wanted.sequence, rows)
            at |= {id(row): [values] for row in rows}
        for step in range(_WRITTEN):
            for row in decoder.rows:
                row.next_token = written[tasks.index(row.task)][row.sample][step]
            found = decoder.forward()
            for row, values in zip(found.rows, found.values, strict=True):
                at[id(row)].append(values)
        ordered = sorted(decoder.rows, key=lambda row: (-row.task.number, row.sample))
        stacked = torch.stack([torch.stack(at[id(row)]) for row in ordered])
        return stacked.unflatten(0, (len(prompts), -1))
    finally:
        for task in tasks:
            decoder.release(task)
        decoder.clear()


@torch.inference_mode()
def _theirs(model: PreTrainedModel, prompts: list[Tokens], written: list[list[Tokens]]) -> Tensor:
    """Logits of the model, as in `_ours`, from one plain forward pass per prompt."""
    found = []
    for prompt, samples in zip(prompts, written, strict=True):
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            decoder = torch.tensor([[start, *sample] for sample in samples], device=model.device)
            ids = torch.tensor([prompt] * len(samples), device=model.device)
            logits = model(input_ids=ids, decoder_input_ids=decoder, use_cache=False).logits
        else:
            rows = [[*prompt, *sample] for sample in samples]
            logits = model(torch.tensor(rows, device=model.device), use_cache=False).logits
        found.append(logits[:, -1 - _WRITTEN :])
    return torch.stack(found)
