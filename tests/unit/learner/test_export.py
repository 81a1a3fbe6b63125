"""What a learner writes for others: whole models, adapters, and the critic beside them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from lmcot.learner.session import LearnerSession
from lmcot.models.adapters import merge_adapters
from tests.support.learner_by_hand import alone
from tests.support.learner_cases import (
    BOTH,
    LORA,
    STAGES,
    Layout,
    distance,
    make_config,
    moved,
    open_session,
    parameters,
    rollouts,
)

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

LLAMA = "counting-llama"


def _plain(folder: Path, kind: str) -> Any:
    """The model as anyone would load it."""
    auto = AutoModelForSeq2SeqLM if kind.endswith("t5") else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name): t for key, t in tensors.items() if key.startswith(name)}


def _frozen(session: LearnerSession) -> dict[str, Tensor]:
    """What does not train, whole."""
    found = {}
    for name, parameter in session.policy.named_parameters():
        if parameter.requires_grad:
            continue
        cut = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if cut else nullcontext():
            found[name] = parameter.detach().clone()
    return found


def _logits(session: LearnerSession, kind: str) -> Tensor:
    """The policy's for a few responses, through its engine."""
    pairs: Any = [(o.rollout.prompt_ids, o.rollout.response_ids) for o in rollouts(kind)]
    plan = session._planner.plan(pairs, range(len(pairs)))
    with torch.no_grad():
        assert len(plan) == 1
        batch = session._planner.lay_out(pairs, plan[0])
        logits = session._engine.forward(batch, values=False)[0]
    order = torch.tensor(plan[0].indices)
    lengths = [len(pairs[index][1]) for index in plan[0].indices]
    return torch.cat([logits.split(lengths)[row] for row in order.argsort()])


@BOTH
@STAGES
def test_plain_transformers_loads_what_is_written(tmp_path: Path, kind: str, stage: int) -> None:
    """[28] gathered at any stage, equal to the policy to the bit; the critic goes elsewhere."""
    dtype = "bfloat16" if stage == 2 else "float32"
    critic = {"kind": "model" if stage == 3 else "head"}
    config = make_config(
        kind,
        {"learning_rate": 1e-2},
        Layout(stage, 2048, True),
        policy__dtype=dtype,
        advantage={"kind": "gae", "critic": critic},
    )
    session = open_session(config)
    before = parameters(session)
    session.ppo.step(rollouts(kind), 0)
    now = parameters(session)
    assert {name.split(".")[0] for name in moved(before, now)} == {"lm", "critic"}
    session.export(tmp_path / "model", tmp_path / "critic")
    model = _plain(tmp_path / "model", kind)
    loaded = {name: p.detach() for name, p in model.named_parameters()}
    assert next(iter(loaded.values())).dtype == getattr(torch, dtype)
    assert not moved(loaded, _part(now, "lm."))
    assert not moved(load_file(tmp_path / "critic" / "model.safetensors"), _part(now, "critic."))
    assert not [n for n in load_file(tmp_path / "model" / "model.safetensors") if "critic" in n]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.get_vocab() == session._tokenizer.get_vocab()
    assert parameters(session).keys() == now.keys()
    assert not moved(parameters(session), now), "exporting changes nothing"
    # And training goes on from there.
    assert session.ppo.step(rollouts(kind, seed=1), 1)["optimiser/updates"] == 1


def test_without_a_critic_none_is_written(tmp_path: Path) -> None:
    session = open_session(make_config(LLAMA, advantage={"kind": "rloo"}))
    session.export(tmp_path / "model", tmp_path / "critic")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------- adapters


@BOTH
@pytest.mark.parametrize("stage", [0, 3])
def test_adapters_train_and_their_base_does_not(tmp_path: Path, kind: str, stage: int) -> None:
    """[9] [28] the reference is the policy without its adapters; merged they are the policy."""
    config = make_config(
        kind,
        {"learning_rate": 5e-2, "weight_decay": 0.1},
        Layout(stage, 2048, True),
        policy__lora=LORA,
    )
    session = open_session(config)
    assert session._reference is None
    first, base = parameters(session), _frozen(session)
    trained = {name for name in first if name.startswith("lm.")}
    assert trained
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert not any("lora_" in name for name in base)
    began = _logits(session, kind)

    metrics = [session.ppo.step(rollouts(kind, seed=step), step) for step in range(2)]
    assert abs(metrics[0]["kl"]) < 1e-6
    assert 0 <= metrics[0]["kl/k3"] < 1e-10
    assert metrics[1]["kl/k3"] > 1e-5
    now = parameters(session)
    assert moved(first, now) == set(first)
    assert not moved(base, _frozen(session))

    names = {name for name, _ in session.trained_tensors()}
    assert names == {name.removeprefix("lm.") for name in trained}
    size = sum(tensor.numel() * tensor.element_size() for tensor in _part(now, "lm.").values())
    assert session.trained_bytes() == size

    session.export(tmp_path / "adapters", tmp_path / "critic")
    written = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(written) == len(trained), "the adapters and nothing else"
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()
    assert not moved(load_file(tmp_path / "critic" / "model.safetensors"), _part(now, "critic."))
    merge_adapters(config.policy.source, tmp_path / "adapters", tmp_path / "merged")
    merged = _plain(tmp_path / "merged", kind)
    logits = _logits(session, kind)
    assert float((logits - began).abs().max()) > 1e-2
    scored = rollouts(kind)
    expected = torch.cat([_own_logits(merged, one.rollout) for one in scored])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def _own_logits(lm: Any, rollout: Any) -> Tensor:
    """Of one response, alone."""
    with torch.no_grad():
        return alone(lm, None, rollout).logits


def test_merged_adapters_keep_the_dtype_that_they_were_trained_in(tmp_path: Path) -> None:
    """In bfloat16 too: the sum is rounded once."""
    config = make_config(
        LLAMA, {"learning_rate": 2e-2}, policy__lora=LORA, policy__dtype="bfloat16"
    )
    session = open_session(config)
    for step in range(2):
        session.ppo.step(rollouts(LLAMA, seed=step), step)
    session.export(tmp_path / "adapters")
    merge_adapters(config.policy.source, tmp_path / "adapters", tmp_path / "merged")
    merged = {name: p.detach() for name, p in _plain(tmp_path / "merged", LLAMA).named_parameters()}
    lora = {name.removeprefix("lm.base_model.model."): t for name, t in parameters(session).items()}
    plain = open_session(make_config(LLAMA)).policy.lm
    layer = "model.layers.1.self_attn.q_proj"
    a, b = (lora[f"{layer}.lora_{part}.default.weight"].float() for part in "AB")
    expected = plain.get_parameter(f"{layer}.weight").detach() + 8 / 4 * b @ a
    assert merged[f"{layer}.weight"].dtype == torch.bfloat16
    assert torch.equal(merged[f"{layer}.weight"], expected.bfloat16())
    assert distance({"": expected}, {"": plain.get_parameter(f"{layer}.weight").detach()}) > 1e-3
