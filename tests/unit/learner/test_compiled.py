"""`learner.compile` compiles what lies between attention, and learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from lmcot.errors import UserError
from lmcot.models.compiled import compile_parts
from lmcot.models.sources import load_model
from tests.support.learner_cases import fixed_kl, make_config, open_session, rollouts

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

LLAMA = "counting-llama"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch compiles is left in no folder of the user's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def _compiled(model: torch.nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if part._compiled_call_impl is not None]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (LLAMA, {"mlp", "input_layernorm", "post_attention_layernorm"}),
        ("counting-t5", {"layer.1", "layer.2"}),  # the feed-forward layers of encoder and decoder
    ],
)
def test_all_but_attention_is_compiled(kind: str, parts: set[str]) -> None:
    model = load_model(f"random:{kind}", "float32")[0]
    names = list(model.state_dict())
    compile_parts([model])
    found = _compiled(model)
    assert all(any(name.endswith(end) for name in found) for end in parts)
    assert all(name.endswith(tuple(parts)) for name in found)
    assert list(model.state_dict()) == names


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "more",
    [{"kl": fixed_kl(0.1, "loss")}, {"policy__lora": {"rank": 4, "alpha": 8}}],
    ids=["whole", "lora"],
)
def test_it_learns_the_same(more: dict[str, Any]) -> None:
    found = []
    for compiled in (False, True):
        session = open_session(
            make_config(LLAMA, learner__compile=compiled, learner__zero_stage=0, **more)
        )
        assert bool(_compiled(session.policy.lm)) == compiled
        found.append([session.ppo.step(rollouts(LLAMA, seed=step), step) for step in range(2)])
    torch._dynamo.reset()
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"compile is on.*zero_stage 3"):
        make_config(LLAMA, learner__compile=True, learner__zero_stage=3)
    with pytest.raises(UserError, match="Linear has no blocks"):
        compile_parts([torch.nn.Linear(2, 2)])

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(UserError, match=r"no C\+\+ compiler.*install g\+\+"):
        open_session(make_config(LLAMA, learner__compile=True))
