"""The kernel of attention is tried once, remembered, and part of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcot.config import Kernel, parse_config
from lmcot.errors import UserError
from lmcot.learner import attention, attention_choice
from lmcot.learner.attention import ATTENTION
from lmcot.learner.attention_choice import Shape, fastest_kernel, shape_of
from lmcot.learner.session import LearnerSession
from lmcot.models.attention import kernel_of
from lmcot.models.sources import load_model
from tests.support.learner_cases import make_config, open_session, rollouts

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

LLAMA = "counting-llama"
SHAPE = Shape(rows=1, prompt=64, responses=64, heads=4, key_heads=2, width=8, dtype="float32")
PAIRS = [((5,) * 70, (7,) * 30), ((5,) * 70, (8,) * 40), ((6,) * 900, (7,))]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing is remembered."""
    monkeypatch.setattr(attention_choice, "cache_folder", lambda: tmp_path)
    return tmp_path / "attention"


def _session(monkeypatch: pytest.MonkeyPatch, kernel: str = "auto", **more: Any) -> LearnerSession:
    monkeypatch.setattr(attention, "TRIED_FROM", 0)
    return open_session(make_config(LLAMA, learner__attention=kernel, **more))


def test_a_trial_is_remembered_by_machine_and_shape(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.random.get_rng_state()
    first = fastest_kernel(SHAPE)
    assert torch.equal(before, torch.random.get_rng_state())
    (file,) = cache.iterdir()
    told = json.loads(file.read_text())
    assert told["kernel"] == first
    assert all(0 < seconds < 60 for seconds in told["seconds"].values())
    file.write_text(json.dumps({**told, "kernel": "products"}))
    assert fastest_kernel(SHAPE) == "products"
    monkeypatch.setattr(attention_choice, "_machine", lambda: {"processor": "another"})
    fastest_kernel(SHAPE)
    assert len(list(cache.iterdir())) == 2


def test_of_several_processes_the_first_decides(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's trial ends when there is a file already."""

    def slow_trial(_: Shape) -> dict[Kernel, float]:
        monkeypatch.setattr(
            attention_choice,
            "_trial",
            lambda _: {"model": 2.0, "fused": 1.0, "products": 3.0},
        )
        assert fastest_kernel(SHAPE) == "fused"
        return {"model": 2.0, "fused": 3.0, "products": 1.0}

    monkeypatch.setattr(attention_choice, "_trial", slow_trial)
    assert fastest_kernel(SHAPE) == "fused"
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("text", ["{", '{"kernel": "fast"}', "{}"])
def test_what_is_damaged_is_named(cache: Path, text: str) -> None:
    fastest_kernel(SHAPE)
    (file,) = cache.iterdir()
    file.write_text(text)
    with pytest.raises(UserError, match=rf"{file.name}' is damaged.*delete it"):
        fastest_kernel(SHAPE)


def test_the_shape_is_that_of_the_longest_shared_row() -> None:
    lm, _ = load_model(f"random:{LLAMA}", "float32")
    shape = shape_of(lm, PAIRS, budget=512)
    assert shape is not None
    assert (shape.rows, shape.prompt, shape.responses) == (2, 128, 128)
    assert shape.heads * shape.width == lm.config.hidden_size
    assert shape_of(lm, PAIRS[1:], budget=512) is None


@pytest.mark.usefixtures("cache")
def test_a_resumed_stage_has_the_kernel_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "fastest_kernel", lambda _: "products")
    session = _session(monkeypatch)
    session.attention.write(tmp_path)
    resumed = _session(monkeypatch)
    resumed.attention.restore(tmp_path)  # of before the first step: nothing is chosen yet
    resumed.attention.choose(PAIRS)
    assert resumed.attention.kernel == kernel_of(resumed.policy.lm) == "products"
    resumed.attention.write(tmp_path)
    monkeypatch.setattr(attention, "fastest_kernel", lambda _: "fused")
    again = _session(monkeypatch)
    again.attention.restore(tmp_path)
    again.attention.choose(PAIRS)
    assert again.attention.kernel == "products"
    assert again._reference is not None
    assert kernel_of(again._reference) == "products"
    (tmp_path / ATTENTION).unlink()  # written by an earlier version
    older = _session(monkeypatch)
    older.attention.restore(tmp_path)
    older.attention.choose(PAIRS)
    assert older.attention.kernel == kernel_of(older.policy.lm) == "model"
    (tmp_path / ATTENTION).write_text('{"kernel": "fast"}')
    with pytest.raises(UserError, match=r"attention\.json' is damaged"):
        _session(monkeypatch).attention.restore(tmp_path)


@pytest.mark.parametrize("more", [{}, {"policy__lora": {"rank": 4, "alpha": 8}}], ids=["", "lora"])
def test_each_kernel_learns_the_same(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    """[32] in float32, up to rounding."""
    found = []
    for kernel in ("model", "fused", "products"):
        session = _session(monkeypatch, kernel, **more)
        assert session.attention.kernel == kernel_of(session.policy.lm) == kernel
        found.append([session.ppo.step(rollouts(LLAMA, seed=step), step) for step in range(2)])
    for metrics in found[1:]:
        for one, other in zip(metrics, found[0], strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_what_cannot_be_is_refused_or_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"attention is 'fused'.*gradient_checkpointing"):
        make_config(LLAMA, learner__attention="fused", learner__gradient_checkpointing=True)
    monkeypatch.setattr(attention, "TRIED_FROM", 0)
    t5 = make_config("counting-t5", learner__attention="products")
    with pytest.raises(UserError, match=r"learner\.attention is 'products'.*T5"):
        open_session(t5)
    kept = open_session(make_config("counting-t5"))
    kept.attention.choose(PAIRS)
    assert kept.attention.kernel == "model"


def test_a_small_model_keeps_its_own() -> None:
    session = open_session(make_config(LLAMA))
    session.attention.choose(PAIRS)
    assert session.attention.kernel == "model"


def test_old_settings_are_read() -> None:
    assert parse_config(make_config(LLAMA).model_dump()).learner.attention == "auto"
