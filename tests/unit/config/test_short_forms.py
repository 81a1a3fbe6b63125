"""Short forms: a string where a section is expected, in files, overrides and Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcot.config import (
    FileData,
    OpenAIFrozen,
    TransformersFrozen,
    differences,
    dump_config,
    parse_config,
    read_config,
    read_yaml_mapping,
)
from lmcot.errors import UserError

SHORT: dict[str, Any] = {
    "data": "mine.jsonl",
    "policy": "random:llama",
    "frozen": "http://127.0.0.1:8000/v1#org/model",
    "teacher": {"kind": "frozen"},
}
FILE = """
data: {train: a.jsonl, validation: b.jsonl, max_train: 5}
policy: {source: "random:llama", max_new_tokens: 64}
frozen: {backend: transformers, source: "random:t5", max_answer_tokens: 8, chat: never}
teacher: {kind: frozen}
"""


def with_overrides(folder: Path, *overrides: str, text: str = FILE) -> Any:
    file = folder / "settings.yaml"
    file.write_text(text)
    return read_config(file, list(overrides))


def test_strings_stand_for_sections() -> None:
    config = parse_config(SHORT)
    assert config.data.train == FileData(kind="file", path="mine.jsonl", part="train")
    assert config.data.validation == FileData(kind="file", path="mine.jsonl", part="validation")
    assert config.policy.source == "random:llama"
    assert isinstance(config.frozen, OpenAIFrozen)
    assert (config.frozen.base_url, config.frozen.model) == (
        "http://127.0.0.1:8000/v1",
        "org/model",
    )


@pytest.mark.parametrize("more", [{}, {"prompts": {"demonstrations": {"kind": "drawn"}}}])
def test_the_settings_of_a_run_hold_the_sections(tmp_path: Path, more: dict[str, Any]) -> None:
    config = parse_config(SHORT | more)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    values = read_yaml_mapping(tmp_path / "dumped.yaml")
    assert isinstance(values["policy"], dict)
    assert differences(parse_config(values), config) == {}


def test_sources_of_files_alone(tmp_path: Path) -> None:
    config = parse_config({**SHORT, "data": {"train": "a", "validation": "b"}})
    assert config.data.train == FileData(kind="file", path="a")
    assert config.data.validation == FileData(kind="file", path="b")


def test_an_override_keeps_the_rest_of_a_models_section(tmp_path: Path) -> None:
    config = with_overrides(
        tmp_path, "policy=random:qwen", "frozen=random:llama", "data.train=c.jsonl"
    )
    assert (config.policy.source, config.policy.max_new_tokens) == ("random:qwen", 64)
    frozen = config.frozen
    assert isinstance(frozen, TransformersFrozen)
    assert (frozen.source, frozen.max_answer_tokens, frozen.chat) == ("random:llama", 8, "never")
    assert config.data.train.path == "c.jsonl"
    assert config.data.validation.path == "b.jsonl"
    assert config.data.max_train == 5


def test_another_backend_keeps_what_all_backends_have(tmp_path: Path) -> None:
    frozen = with_overrides(tmp_path, "frozen=https://host.example/v1#m").frozen
    assert isinstance(frozen, OpenAIFrozen)
    assert (frozen.max_answer_tokens, frozen.model) == (8, "m")


def test_another_endpoint_is_not_sent_the_key_of_this_one(tmp_path: Path) -> None:
    text = FILE.replace(
        'backend: transformers, source: "random:t5"',
        "backend: openai, base_url: http://a.example/v1, model: m, api_key_env: A_KEY",
    ).replace(", chat: never", "")
    frozen = with_overrides(tmp_path, "frozen=http://b.example/v1#m", text=text).frozen
    assert (frozen.base_url, frozen.api_key_env) == ("http://b.example/v1", "OPENAI_API_KEY")
    assert frozen.max_answer_tokens == 8


def test_vllm_stays_vllm(tmp_path: Path) -> None:
    text = FILE.replace("backend: transformers", "backend: vllm")
    frozen = with_overrides(tmp_path, "frozen=random:llama", text=text).frozen
    assert (frozen.backend, frozen.source) == ("vllm", "random:llama")


def test_an_override_may_go_below_a_short_form(tmp_path: Path) -> None:
    text = "data: a.jsonl\npolicy: random:llama\nfrozen: random:t5\nteacher: {kind: frozen}\n"
    config = with_overrides(
        tmp_path, "policy.max_new_tokens=7", "frozen.max_answer_tokens=9",
        "data.train.columns.question=q", text=text,
    )  # fmt: skip
    assert config.policy.max_new_tokens == 7
    assert config.frozen.max_answer_tokens == 9
    assert (config.data.train.columns.question, config.data.train.part) == ("q", "train")
    assert config.data.validation.columns.question is None


def test_one_file_replaces_both_sources_and_keeps_the_rest(tmp_path: Path) -> None:
    data = with_overrides(tmp_path, "data=c.jsonl").data
    assert (data.train.path, data.train.part, data.max_train) == ("c.jsonl", "train", 5)


@pytest.mark.parametrize(
    "override", ["frozen=http://secret.example/v1", "frozen=http://s.example#"]
)
def test_an_address_without_a_model_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"^frozen is an address without a model") as refused:
        with_overrides(tmp_path, override)
    assert "example" not in str(refused.value)
    with pytest.raises(UserError, match=r"^frozen is an address without a model"):
        parse_config({**SHORT, "frozen": override.partition("=")[2]})


@pytest.mark.parametrize("key", ["teacher", "refine", "rewards"])
def test_other_sections_have_no_short_form(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' is 'x'"):
        parse_config({**SHORT, key: "x"})
