"""Starts vLLM in this process; what it refuses is told in terms of the settings."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch

from lmcot.config import Dtype, LoraSettings, VllmSettings
from lmcot.config.models import VLLM_RANKS
from lmcot.errors import UserError
from lmcot.models.sources import load_config, resolve_dtype, resolve_source

MOST_LOGPROBS = 128
"""How many tokens vLLM gives the log-probabilities of at one place."""
_SHARE = 0.01
"""Share of a GPU that must be free when vLLM starts. By itself vLLM asks for nearly all of it, even
where the size of its cache is given, and so would refuse a GPU that actors share."""
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The threads of a process are the settings' to choose.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Where a model is divided among processes: this one may have threads, and CUDA.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The process only connects to itself: vLLM need not look for another address.
    "VLLM_HOST_IP": "127.0.0.1",
}
"""What vLLM reads when it is imported; what the user has set stays."""


def check_vllm(asked: str, instead: str, key: str, source: str) -> None:
    """Checks before anything starts that vLLM is there, and that it runs models of such a kind.

    Args:
        asked: which setting asks for vLLM.
        instead: what to do with that setting if vLLM cannot be used.
        key: what the model is called.

    Raises:
        UserError: if not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{asked}, but the package vllm is not installed: install it (see docs/engines.md), or "
            f"{instead}"
        )
    if load_config(source).is_encoder_decoder:
        raise UserError(
            f"{asked}, but {key} '{source}' is an encoder-decoder, which vLLM does not run: "
            f"{instead}"
        )


def start_vllm(
    source: str,
    dtype: Dtype,
    settings: VllmSettings,
    lora: LoraSettings | None = None,
    *,
    sleeps: bool = False,
) -> Any:
    """Starts vLLM's `LLMEngine` with the model of a source.

    Args:
        lora: of the adapters that it will be given.
        sleeps: whether it is to free its memory of a GPU at times.

    Raises:
        UserError: if vLLM does not run the model, or the memory does not suffice.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = EngineArgs(
        model=resolve_source(source),
        dtype=str(resolve_dtype(dtype)).removeprefix("torch."),
        enforce_eager=not torch.cuda.is_available(),
        kv_cache_memory_bytes=int(settings.cache_gib * 2**30),
        gpu_memory_utilization=_SHARE,
        max_model_len=settings.max_context,
        # Log-probabilities of the distribution that a token is drawn from.
        logprobs_mode="processed_logprobs",
        max_logprobs=MOST_LOGPROBS,
        enable_prefix_caching=True,
        # Where a prompt is read in parts, vLLM rewinds the generator of its seed after each, which
        # torch's generators for CPUs cannot do: unset is vLLM's own choice, for GPUs.
        enable_chunked_prefill=None if torch.cuda.is_available() else False,
        tensor_parallel_size=settings.tensor_parallel,
        # Of several processes; in a Ray actor vLLM would ask Ray for more actors.
        distributed_executor_backend="uni" if settings.tensor_parallel == 1 else "mp",
        skip_tokenizer_init=True,
        # Sampling filters in the model's own generation_config would change the samples.
        generation_config="vllm",
        disable_log_stats=True,
        # Only a GPU's memory can be freed in between.
        enable_sleep_mode=sleeps and torch.cuda.is_available(),
        seed=0,  # each request brings its own
        **({} if lora is None else _room_for(lora)),
    )
    with refusals(f"vLLM does not run the model of '{source}'"):
        config = arguments.create_engine_config()
    _check_heads(source, config.model_config.get_head_size())
    window = config.model_config.max_model_len
    with refusals(
        f"vLLM does not start with '{source}', cache_gib {settings.cache_gib:g} and a window of "
        f"{window} tokens"
    ):
        return LLMEngine.from_vllm_config(config, disable_log_stats=True)


def _room_for(lora: LoraSettings) -> dict[str, Any]:
    """vLLM's arguments by which it keeps one set of adapters."""
    rank = next(rank for rank in VLLM_RANKS if rank >= lora.rank)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Tells the user what vLLM refuses.

    vLLM refuses models, windows and sizes of its cache with a ValueError. Any other error is
    raised as it is, except for a GPU's memory, which the settings divide.

    Raises:
        UserError: for a refusal.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = shorten(str(error), 300)
        raise UserError(
            f"{what}: the GPU's memory does not suffice; lower cache_gib, or give the actor a "
            f"larger share of a GPU ({reason})"
        ) from error
    except ValueError as error:
        raise UserError(f"{what}: {shorten(str(error), 300)}") from error


def _check_heads(source: str, size: int) -> None:
    """Checks that vLLM's attention for CPUs has a kernel for the model: it fails only when used.

    Raises:
        UserError: if it has none.
    """
    if torch.cuda.is_available():
        return  # vLLM chooses among several attentions there, and refuses at its start
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise UserError(
            f"vLLM does not run the model of '{source}': its attention heads have {size} elements, "
            f"and vLLM's kernels for CPUs know {', '.join(map(str, sizes))}"
        )
