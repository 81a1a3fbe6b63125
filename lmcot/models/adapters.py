"""LoRA adapters on the small LM, through peft."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcot.config import LoraSettings
from lmcot.errors import UserError
from lmcot.files import read_object
from lmcot.storage import replacing

if TYPE_CHECKING:
    from lmcot.storage import Place


def add_adapters(lm: PreTrainedModel, settings: LoraSettings, seed: int) -> PreTrainedModel:
    """Wraps a model so that only its new adapters train; they start as the identity.

    Raises:
        UserError: if ``target_modules`` names no layer of the model, or a layer with tied
            weights: merging its adapter would change both layers.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    seq2seq = lm.config.is_encoder_decoder
    targets = settings.target_modules
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
    )
    torch.manual_seed(seed)
    try:
        wrapped: Any = get_peft_model(lm, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(
            f"policy.lora.target_modules does not fit the model: {shorten(str(error), 300)}"
        ) from None
    ends = (wrapped.get_input_embeddings(), wrapped.get_output_embeddings())
    if ends[0].weight is ends[1].weight and any(hasattr(layer, "lora_A") for layer in ends):
        raise UserError(
            "policy.lora.target_modules names the model's embedding or output layer, which are "
            "one: leave it out"
        )
    return wrapped


def has_adapters(lm: nn.Module) -> bool:
    """Whether `add_adapters` made the model."""
    return hasattr(lm, "disable_adapter")


@contextmanager
def adapters_off(lm: nn.Module) -> Iterator[None]:
    """Disables the adapters inside the block, so that the model is the base model."""
    model: Any = lm
    with model.disable_adapter():
        yield


def save_adapters(lm: nn.Module, tensors: Mapping[str, Tensor], folder: Place) -> None:
    """Writes adapters atomically, in peft's format.

    Args:
        tensors: the trained parameters, by their names in ``lm``.
    """
    model: Any = lm
    for config in model.peft_config.values():
        config.base_model_name_or_path = _from_anywhere(config.base_model_name_or_path)
    with replacing(folder) as partial:
        # Otherwise peft asks the hub whether the vocabulary of the base model was resized.
        model.save_pretrained(partial, state_dict=dict(tensors), save_embedding_layers=False)


def _from_anywhere(base: str) -> str:
    """A model's name that is valid in every working directory: a hub id or an absolute path."""
    return os.path.abspath(base) if os.path.isdir(base) else base


def base_of(adapters: Path) -> str:
    """The source of the model that adapters were trained on.

    Raises:
        UserError: if their adapter_config.json does not name it.
    """
    file = adapters / "adapter_config.json"
    base = read_object(file, "save the adapters again").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"'{file}' does not name its base: give 'base_model_name_or_path' a source")
    return base


def merge_adapters(
    source: str, adapters: Path, folder: Place, dtype: torch.dtype | None = None
) -> None:
    """Writes a model with its adapters added to its weights, as a plain Hugging Face folder.

    Args:
        dtype: that of the weights; unset: that of the adapters.
    """
    from peft import PeftModel

    from lmcot.models.sources import load_model, save_model

    lm, tokenizer = load_model(source, "float32")
    merged = PeftModel.from_pretrained(lm, adapters).merge_and_unload()
    save_model(merged.to(dtype or _dtype_of(adapters)), tokenizer, folder)


def _dtype_of(adapters: Path) -> torch.dtype:
    from safetensors import safe_open

    with safe_open(adapters / "adapter_model.safetensors", "pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype
