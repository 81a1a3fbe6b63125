"""Windows and vocabularies, from configs that models on the hub have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoTokenizer,
    BartConfig,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    T5Config,
    XLNetConfig,
)

from lmcot.errors import UserError
from lmcot.models.limits import Limits, read_limits, window_of
from lmcot.models.sources import load_tokenizer, resolve_source

pytestmark = pytest.mark.usefixtures("model_cache")


def _scaled(window: int, **scaling: Any) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=window, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (GPT2Config(n_positions=128), 128),
        (OPTConfig(max_position_embeddings=2048), 2048),
        (BartConfig(max_position_embeddings=1024), 1024),
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (Gemma3TextConfig(max_position_embeddings=32768, sliding_window=512), 32768),
        (_scaled(4096, rope_type="linear", factor=4.0), 16384),
        (_scaled(4096, rope_type="dynamic", factor=2.0), 8192),
        (
            _scaled(
                131072, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            131072,
        ),
        (
            Qwen2Config(
                max_position_embeddings=32768,
                rope_scaling={
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768
                },
            ),
            131072,
        ),
        (T5Config(n_positions=512), None),
        (BloomConfig(), None),
        (XLNetConfig(), None),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, PreTrainedConfig) else str(one),
)  # fmt: skip
def test_the_window_is_what_the_positions_reach(
    config: PreTrainedConfig, window: int | None
) -> None:
    assert window_of(config) == window


@pytest.mark.parametrize(
    ("limits", "prompt", "reply", "fits"),
    [
        (Limits("m", 100, False), 60, 40, True),
        (Limits("m", 100, False), 61, 40, False),
        (Limits("m", 100, True), 100, 100, True),
        (Limits("m", 100, True), 101, 1, False),
        (Limits("m", 100, True), 1, 101, False),
        (Limits("m", None, False), 10**9, 10**9, True),
    ],
)
def test_prompt_and_reply_share_a_window_without_an_encoder(
    limits: Limits, prompt: int, reply: int, fits: bool
) -> None:
    assert limits.fit(prompt, reply) is fits


def _copy(folder: Path, kind: str = "llama") -> Path:
    shutil.copytree(resolve_source(f"random:{kind}"), folder)
    return folder


def _rows(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_limits(str(folder), load_tokenizer(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_knows_its_tokenizer_is_taken(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "m")
    assert read_limits(str(folder), load_tokenizer(str(folder))) == Limits(str(folder), 2048, False)


def test_words_that_were_added_without_embeddings_are_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "m")
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), _rows(folder)
    tokenizer.add_tokens(["Lake", "Oster"])
    tokenizer.save_pretrained(folder)
    said = _refusal(folder)
    assert f"has 2 tokens for which the model has no embedding, among them 'Lake' ({rows};" in said
    assert "resize_token_embeddings" in said


def test_a_pad_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    """As fine-tuned models have it whose makers added one and did not resize."""
    folder = _copy(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert "has 1 tokens for which the model has no embedding, among them '[PAD]'" in _refusal(
        folder
    )


def test_a_special_token_that_nothing_uses_needs_no_embedding(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one for images, which its text models do not know."""
    folder = _copy(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(str(folder))) == _rows(folder) + 1
    assert read_limits(str(folder), load_tokenizer(str(folder))).window == 2048


def test_a_decoder_needs_a_token_to_start_with(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "m", "t5")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["decoder_start_token_id"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "has no decoder_start_token_id" in _refusal(folder)
