"""Puts new weights into a vLLM engine that runs, in place."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def reload(vllm: Any, tensors: Iterable[tuple[str, Tensor]], processes: int) -> None:
    """Has an idle `LLMEngine` take weights, by their names in a Hugging Face folder.

    Args:
        processes: among which the model is divided.
    """
    if processes == 1:
        vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
    else:
        # Each process reads its part of a file, which only exists in memory.
        with TemporaryDirectory(dir=_in_memory()) as folder:
            save_file(dict(tensors), Path(folder) / "model.safetensors")
            vllm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    vllm.apply_model(_pack_tied_layers)


def _in_memory() -> str | None:
    """A folder that lies in memory; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _pack_tied_layers(model: torch.nn.Module) -> None:
    """Packs weights again that two layers share, for vLLM's kernels for CPUs.

    Loading packs only the layer that the weights are named after. An output layer that is tied to
    the embedding would keep what was packed of the old weights.
    """
    layer: Any
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and isinstance(weight, Tensor) and weight.numel():
            layer.quant_method.process_weights_after_loading(layer)
