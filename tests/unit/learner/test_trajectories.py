"""Settings of the learner on which no result depends: every way through gives one trajectory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from lmcot.config import Config
from tests.support.learner_cases import (
    LORA,
    Layout,
    distance,
    make_config,
    moved,
    off_policy,
    open_session,
    parameters,
    rollouts,
)

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

LLAMA, T5 = "counting-llama", "counting-t5"
ADAM = {"learning_rate": 0.3, "betas": [0.8, 0.9], "eps": 1.0, "weight_decay": 0.01}
"""With an eps of 1 Adam does not blow up what rounding does to gradients near 0."""


class Way(NamedTuple):
    """How a trajectory is come by."""

    kind: str
    stage: int
    budget: int
    share: bool
    offload: str = "none"
    dtype: str = "float32"


class Trajectory(NamedTuple):
    metrics: tuple[dict[str, float], ...]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def _config(way: Way) -> Config:
    # One architecture has a value head, the other a critic of its own.
    critic = {"kind": "head" if way.kind == LLAMA else "model"}
    return make_config(
        way.kind,
        {**ADAM, "decay": "linear", "max_grad_norm": 0.5},
        Layout(way.stage, way.budget, way.share),
        minibatches=2,  # of four and three rationales
        entropy_coefficient=0.01,
        advantage={"kind": "gae", "critic": critic},
        learner__offload=way.offload,
        policy__dtype=way.dtype,
    )


@functools.cache
def _trajectory(way: Way) -> Trajectory:
    """Two PPO steps of two updates each."""
    session = open_session(_config(way))
    before = parameters(session)
    metrics = []
    for step in range(2):
        metrics.append(session.ppo.step(off_policy(rollouts(way.kind, seed=step)), step))
        assert metrics[-1]["optimiser/updates"] == 2
    return Trajectory(tuple(metrics), before, parameters(session))


WAYS = [
    *(
        Way(LLAMA, stage, budget, share)
        for stage in (0, 1, 2)
        for budget, share in ((1, False), (24, True), (40, False), (2048, True))
    ),
    Way(LLAMA, 3, 40, True),
    Way(LLAMA, 3, 2048, False),
    Way(LLAMA, 1, 40, True, "optimiser"),
    Way(LLAMA, 2, 40, True, "optimiser"),
    Way(LLAMA, 3, 40, True, "optimiser"),
    Way(LLAMA, 3, 40, True, "optimiser_and_parameters"),
    Way(T5, 0, 24, True),
    Way(T5, 0, 2048, True),
    Way(T5, 1, 40, True),
    Way(T5, 2, 24, False),
    Way(T5, 3, 2048, True),
    Way(T5, 2, 2048, True, "optimiser"),
]


@pytest.mark.parametrize("way", [way for way in WAYS if way[1:4] != (0, 1, False)], ids=str)
def test_one_trajectory_in_float32(way: Way) -> None:
    """[31] [22] micro-batches, shared prompts, ZeRO stage and offloading change no number."""
    expected, found = _trajectory(Way(way.kind, 0, 1, False)), _trajectory(way)
    assert distance(expected.before, found.before) == 0
    assert distance(expected.before, expected.after) > 3e-2
    assert distance(expected.after, found.after) < 1e-5
    for one, other in zip(expected.metrics, found.metrics, strict=True):
        assert one.keys() == other.keys()
        assert one["policy/approx_kl"] > 0
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_trajectory_in_bfloat16(stage: int) -> None:
    """[31] loosely, for bfloat16 has 8 bits: much closer to float32's than that is to its start."""
    exact = _trajectory(Way(LLAMA, 0, 1, False))
    found = _trajectory(Way(LLAMA, stage, 24, True, dtype="bfloat16"))
    way = sum(float((exact.after[n].float() - p).square().sum()) for n, p in exact.before.items())
    off = sum(
        float((exact.after[name] - tensor.float()).square().sum())
        for name, tensor in found.after.items()
    )
    assert off**0.5 < 0.1 * way**0.5
    for one, other in zip(exact.metrics, found.metrics, strict=True):
        assert other["optimiser/grad_norm"] == pytest.approx(one["optimiser/grad_norm"], rel=2e-2)
        for name in ("loss/policy", "loss/value", "policy/entropy", "kl"):
            assert other[name] == pytest.approx(one[name], rel=2e-2, abs=5e-3), name


# ---------------------------------------------------------------- gradient checkpointing

CHECKPOINTED: dict[str, dict[str, Any]] = {
    "all": {},
    "lora": {"policy__lora": LORA},
    "critic": {"advantage": {"kind": "gae", "critic": {"kind": "model"}}},
}


@pytest.mark.parametrize(
    ("kind", "stage", "extra"),
    [
        (LLAMA, 0, "all"),
        (T5, 2, "all"),
        (T5, 0, "lora"),
        (LLAMA, 3, "lora"),
        (T5, 0, "critic"),
        (LLAMA, 2, "critic"),
    ],
)
def test_gradient_checkpointing_changes_no_number(kind: str, stage: int, extra: str) -> None:
    """[31] blocks are run again in the backward pass, and the step is the same."""
    results, runs = [], []
    for checkpointing in (False, True):
        session = open_session(
            make_config(
                kind,
                ADAM,
                Layout(stage, 2048, True),
                learner__gradient_checkpointing=checkpointing,
                **CHECKPOINTED[extra],
            )
        )
        names = ("layers.0.mlp", "block.0.layer.1", "block.0.layer.2")
        passes: dict[str, int] = {}
        for name, module in session.policy.named_modules():
            if name.endswith(names):
                module.register_forward_pre_hook(functools.partial(_count, passes, name))
        before = parameters(session)
        metrics = session.ppo.step(off_policy(rollouts(kind)), 0)
        assert moved(before, parameters(session))
        results.append((metrics, parameters(session)))
        runs.append(passes)
    (one, plain), (other, again) = results
    assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert distance(plain, again) < 1e-6
    assert any(name.startswith("critic.") for name in runs[0]) == (extra == "critic")
    assert runs[1] == {name: count + 1 for name, count in runs[0].items()}


def _count(passes: dict[str, int], name: str, *_: Any) -> None:
    passes[name] = passes.get(name, 0) + 1
