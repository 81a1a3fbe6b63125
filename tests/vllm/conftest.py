"""Tests with vLLM itself, in an environment of their own.

`make vllm-tools` makes it; `.venv-vllm/bin/python -m pytest tests/vllm` runs them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmcot.models.sources import resolve_source

_THERE = importlib.util.find_spec("vllm") is not None
if _THERE:  # else other tests of the process would run with it
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where vLLM is not installed."""
    if not _THERE:
        reason = "needs vLLM: run `make vllm-tools`, then `make test-vllm`"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def make_model(
    folder: Path,
    *,
    kind: str = "llama",
    seed: int = 0,
    tied: bool = True,
    spread: float = 0.2,
    window: int = 512,
) -> str:
    """A tiny random model whose heads have a size that vLLM's kernels know.

    Args:
        kind: the tokenizer is that of ``random:KIND``.
        spread: of the weights; unless it is small, the logits lie far apart, so that two
            arithmetics rarely disagree on the likeliest token.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(f"random:{kind}"))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=window,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=tied,
            initializer_range=spread,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain(source: str, dtype: str) -> Any:
    """The model on transformers, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()


@torch.no_grad()
def plain_logprobs(model: Any, ids: tuple[int, ...], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the token after each of these, by a plain pass."""
    logits = model(torch.tensor([ids])).logits[0].float()
    return (logits / temperature).log_softmax(-1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")
