"""LoRA adapters: nothing at first, nothing but them trains, and merged they are a plain model."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lmcot.config import LoraSettings
from lmcot.errors import UserError
from lmcot.models.adapters import (
    adapters_off,
    add_adapters,
    has_adapters,
    merge_adapters,
    save_adapters,
)
from lmcot.models.policy import Policy, response_logits, shares_prompts, value_head
from lmcot.models.sequences import Row, SequenceBatch, make_batch
from lmcot.models.sources import load_model, resolve_source, save_model
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("kind", ["llama", "t5"])
SETTINGS = LoraSettings(rank=4, alpha=8)


def _batch(kind: str) -> SequenceBatch:
    rows = [Row([11, 12, 13], [[30, 31, 1], [40, 1]]), Row([14], [[50, 51, 52, 1]])]
    return make_batch(rows, pad_id=0, start_id=0 if kind == "t5" else None)


@torch.no_grad()
def _logits(lm: Any, kind: str) -> Tensor:
    return response_logits(lm, _batch(kind))[0]


def _adapted(tiny: TinyModel, kind: str, **changes: Any) -> Any:
    lm = copy.deepcopy(tiny(kind)[0])
    return add_adapters(lm, SETTINGS.model_copy(update=changes), seed=0)


@torch.no_grad()
def _train(lm: Any) -> dict[str, Tensor]:
    """Moves the adapters far enough to be seen; gives them by name."""
    generator = torch.Generator().manual_seed(3)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return trained


@BOTH
def test_at_first_they_change_nothing(tiny: TinyModel, kind: str) -> None:
    """[9] the policy equals the reference at step 0."""
    lm = _adapted(tiny, kind)
    assert has_adapters(lm)
    assert not has_adapters(tiny(kind)[0])
    assert torch.equal(_logits(lm, kind), _logits(tiny(kind)[0], kind))
    policy = Policy(lm)
    assert policy.start_id == (0 if kind == "t5" else None)
    assert shares_prompts(lm, policy.start_id)


@BOTH
def test_only_adapters_train(tiny: TinyModel, kind: str) -> None:
    """Every linear layer but the output layer has two matrices; all of them get a gradient."""
    lm = _adapted(tiny, kind)
    policy = Policy(lm, value_head(lm, 0))
    _train(lm)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    logits, _ = policy(_batch(kind), values=True)
    logits.logsumexp(-1).sum().backward()
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if "lora_" in name}
    # Llama: 2 layers of q, k, v, o, gate, up, down. T5: 2 encoder layers of q, k, v, o, wi_0,
    # wi_1, wo, and 2 decoder layers that have q, k, v, o a second time.
    assert len(trained) == 2 * {"llama": 2 * 7, "t5": 2 * 7 + 2 * 11}[kind]
    assert not any("lm_head" in name for name in trained)
    parameters = dict(lm.named_parameters())
    assert all(bool(parameters[name].grad.any()) for name in trained)
    torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=1.0).step()
    moved = {n for n, t in lm.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == trained


@BOTH
def test_switched_off_they_leave_the_base(tiny: TinyModel, kind: str) -> None:
    """[9] the reference never changes: the adapters off, the model is what it was, to the bit."""
    lm = _adapted(tiny, kind)
    base = _logits(lm, kind)
    _train(lm)
    adapted = _logits(lm, kind)
    assert float((adapted - base).abs().max()) > 1e-3
    with adapters_off(lm):
        assert torch.equal(_logits(lm, kind), base)
    assert torch.equal(_logits(lm, kind), adapted)
    with pytest.raises(KeyboardInterrupt), adapters_off(lm):
        raise KeyboardInterrupt
    assert torch.equal(_logits(lm, kind), adapted), "on again after an error too"
    assert {n for n, p in lm.named_parameters() if p.requires_grad} == {
        n for n, _ in lm.named_parameters() if "lora_" in n
    }


def test_the_seed_decides(tiny: TinyModel) -> None:
    """Every rank makes its own: they must be the same."""
    lm = tiny("llama")[0]
    ones, others = (
        [p for p in add_adapters(copy.deepcopy(lm), SETTINGS, seed).parameters() if p.requires_grad]
        for seed in (0, 1)
    )
    torch.manual_seed(17)
    again = [p for p in _adapted(tiny, "llama").parameters() if p.requires_grad]
    assert all(map(torch.equal, ones, again))
    assert not all(map(torch.equal, ones, others))


def test_alpha_over_rank_scales_the_product(tiny: TinyModel) -> None:
    """Hu et al. 2022, section 4.1: W + (alpha / rank) B A, on one layer by hand."""
    lm = _adapted(tiny, "llama", rank=2, alpha=6, target_modules=("v_proj",))
    trained = _train(lm)
    assert len(trained) == 4
    layer = lm.base_model.model.model.layers[1].self_attn.v_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (2, 64)
    with torch.no_grad():
        expected = x @ (layer.base_layer.weight + 3.0 * b @ a).T
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_adapters_have_the_models_dtype(tiny: TinyModel) -> None:
    lm = add_adapters(copy.deepcopy(tiny("llama")[0]).bfloat16(), SETTINGS, seed=0)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}


@BOTH
def test_merged_they_are_a_plain_model(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Plain transformers, that must not know of peft, loads a model with the same logits."""
    lm = _adapted(tiny, kind)
    expected = _logits(lm, kind)
    trained = _train(lm)
    adapted = _logits(lm, kind)
    copies = {name: tensor.detach().clone() for name, tensor in trained.items()}
    for parameter in trained.values():
        parameter.data.zero_()  # as at stage 3: what is written is what is given
    save_adapters(lm, copies, tmp_path / "adapters")
    assert {path.name for path in (tmp_path / "adapters").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    size = (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size
    whole = sum(p.numel() * p.element_size() for p in tiny(kind)[0].parameters())
    assert size < whole / 5, "the base model is not written with them"

    merge_adapters(f"random:{kind}", tmp_path / "adapters", tmp_path / "merged")
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not any(name.startswith("adapter") for name in files)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert not any("peft" in key or "lora" in key for key in config)
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of it fails
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    merged, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.dtype == torch.float32
    found = _logits(merged.eval(), kind)
    torch.testing.assert_close(found, adapted, atol=1e-5, rtol=0)
    assert float((found - expected).abs().max()) > 1e-3


def test_bfloat16_adapters_make_a_bfloat16_model(tiny: TinyModel, tmp_path: Path) -> None:
    """They are added in float32, and the sum is rounded once."""
    lm = add_adapters(copy.deepcopy(tiny("llama")[0]).bfloat16(), SETTINGS, seed=0)
    save_adapters(lm, _train(lm), tmp_path / "adapters")
    merge_adapters("random:llama", tmp_path / "adapters", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    layer = lm.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    base = tiny("llama")[0].model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        expected = (base + 2.0 * b @ a).bfloat16()
    found = merged.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(found, expected, atol=0, rtol=2**-7)
    assert float((found != expected).float().mean()) < 0.01


def test_saving_asks_no_hub(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base came from a hub id, and there is no network any more."""
    lm = _adapted(tiny, "llama")
    lm.peft_config["default"].base_model_name_or_path = "org/model"

    def ask(*_: Any, **__: Any) -> bool:
        raise AssertionError("peft asked the hub")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", ask)
    save_adapters(lm, _train(lm), tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (("nope",), "Target modules {'nope'} not found in the base model"),
        ((), "No `target_modules` passed"),
        # What is no linear layer: the sentence is not cut where its description breaks the line.
        (("mlp",), "(gate_proj): Linear"),
        (("q_proj", "lm_head"), "names the model's embedding or output layer, which are one"),
        (("embed_tokens",), "names the model's embedding or output layer, which are one"),
    ],
)
def test_modules_that_cannot_be_adapted(
    tiny: TinyModel, modules: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        _adapted(tiny, "llama", target_modules=modules)
    sentence = str(caught.value)
    assert sentence.startswith("policy.lora.target_modules ")
    assert said in sentence
    assert "\n" not in sentence


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_an_output_layer_of_its_own_may_have_an_adapter(tiny: TinyModel, tmp_path: Path) -> None:
    """As Flan-T5's, whose config says that it is tied: merged, the logits are the adapted ones."""
    base, tokenizer = copy.deepcopy(tiny("t5")[0]), tiny("t5")[1]
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().flip(0).clone())
    assert base.config.tie_word_embeddings
    save_model(base, tokenizer, tmp_path / "base")
    settings = SETTINGS.model_copy(update={"target_modules": ("lm_head", "wo")})
    lm = add_adapters(base, settings, seed=0)
    save_adapters(lm, _train(lm), tmp_path / "adapters")
    merge_adapters(str(tmp_path / "base"), tmp_path / "adapters", tmp_path / "merged")
    merged, _ = load_model(str(tmp_path / "merged"), "float32")
    torch.testing.assert_close(_logits(merged, "t5"), _logits(lm, "t5"), atol=1e-5, rtol=0)
    assert torch.equal(merged.shared.weight, tiny("t5")[0].shared.weight)


def test_the_base_is_named_by_a_whole_path(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder may be given relative to the current one: peft loads from any other."""
    from peft import PeftModel

    save_model(*tiny("llama"), tmp_path / "run" / "distilled")
    monkeypatch.chdir(tmp_path)
    lm = add_adapters(load_model("run/distilled", "float32")[0], SETTINGS, seed=0)
    save_adapters(lm, _train(lm), Path("run/refined-adapters"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    adapters = tmp_path / "run" / "refined-adapters"
    base = json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "run" / "distilled")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters)


@BOTH
def test_their_folder_is_a_source(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its model is the base with the adapters; it is merged once."""
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path / "cache"))
    save_model(*tiny(kind), tmp_path / "base")
    lm = add_adapters(load_model(str(tmp_path / "base"), "float32")[0], SETTINGS, seed=0)
    trained = _train(lm)
    save_adapters(lm, trained, tmp_path / "mine")
    loaded, tokenizer = load_model(str(tmp_path / "mine"), "float32")
    assert tokenizer.eos_token_id == tiny(kind)[1].eos_token_id
    assert torch.allclose(_logits(loaded, kind), _logits(lm, kind), atol=1e-4)
    assert not torch.allclose(_logits(loaded, kind), _logits(tiny(kind)[0], kind), atol=1e-2)
    (merged,) = (tmp_path / "cache" / "models").glob("mine-*")
    made = (merged / "config.json").stat().st_mtime_ns
    assert resolve_source(str(tmp_path / "mine")) == str(merged)
    assert (merged / "config.json").stat().st_mtime_ns == made
    save_adapters(lm, {name: 2 * tensor for name, tensor in trained.items()}, tmp_path / "mine")
    other = resolve_source(str(tmp_path / "mine"))
    assert other != str(merged), "other adapters, other model"
    save_model(*tiny(kind), tmp_path / "base")
    assert resolve_source(str(tmp_path / "mine")) not in (other, str(merged)), "and other base"


def test_adapters_that_cannot_be_added(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path / "cache"))
    lm = _adapted(tiny, "llama")
    folder = tmp_path / "mine"
    save_adapters(lm, _train(lm), folder)
    config = json.loads((folder / "adapter_config.json").read_text())

    def with_base(base: str | None) -> str:
        changed = json.dumps({**config, "base_model_name_or_path": base})
        (folder / "adapter_config.json").write_text(changed)
        return str(folder)

    for base, told in (
        (None, "does not name its base"),
        (str(folder), "which holds adapters too: merge those first"),
        (str(tmp_path / "gone"), f"the model source '{tmp_path}/gone' is not there"),
        ("random:t5", "cannot be added to 'random:t5'"),
    ):
        with pytest.raises(UserError, match=told):
            resolve_source(with_base(base))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged .*: save the adapters again"):
        resolve_source(str(folder))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled adapters are not read"):
        resolve_source(str(folder))
    assert not list((tmp_path / "cache").glob("models/mine-*"))


def test_a_base_of_the_hub_keeps_its_name(tiny: TinyModel, tmp_path: Path) -> None:
    lm = copy.deepcopy(tiny("llama")[0])
    lm.__dict__["name_or_path"] = "org/model"
    wrapped = add_adapters(lm, SETTINGS, seed=0)
    save_adapters(wrapped, _train(wrapped), tmp_path / "adapters")
    found = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == "org/model"
