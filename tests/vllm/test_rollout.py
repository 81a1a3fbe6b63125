"""Rollout actors on vLLM, as plain objects: what they sample, and with which weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcot.actors import rollout_actor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.samplers import VllmSampler
from lmcot.actors.units import Packed, RolloutUnit
from lmcot.actors.weights import Weights, pack_weights
from lmcot.config import LoraSettings, PolicySettings, PromptSettings, VllmRollout
from lmcot.errors import UserError
from lmcot.models.adapters import add_adapters
from lmcot.models.generation.requests import Event
from lmcot.records import Example, Rollout
from tests.vllm.conftest import make_model, plain, plain_logprobs

UNIT = RolloutUnit(
    unit_id="3/0",
    questions=Packed.of(tuple(Example(name, f"{name}?", "!", ()) for name in ("born", "film"))),
    samples=4,
    temperature=0.7,
    max_new_tokens=12,
    seed=7,
    step=3,
    policy_version=0,
)


ENGINE = VllmRollout(engine="vllm", cache_gib=0.1)


@dataclass(frozen=True)
class Reference:
    """What stands for an object in Ray's store."""

    weights: Weights

    def hex(self) -> str:
        return str(id(self.weights))


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda given: given.weights)
    monkeypatch.setattr(rollout_actor, "use_threads", lambda threads: None)


def _published(source: str, version: int) -> Weights:
    """A model's weights as the learner packs them."""
    named = list(plain(source, "float32").named_parameters())
    return pack_weights(named, sum(p.numel() * p.element_size() for _, p in named), version)


def _check(rollouts: list[Rollout], source: str) -> None:
    """Checks each token's log-probability against a plain pass of the weights of a source."""
    _check_against(plain(source, "float32"), rollouts)


def _check_against(model: Any, rollouts: list[Rollout]) -> None:
    for one in rollouts:
        rows = plain_logprobs(model, (*one.prompt_ids, *one.response_ids), UNIT.temperature)
        rows = rows[len(one.prompt_ids) - 1 : -1]
        wanted = rows.gather(1, torch.tensor(one.response_ids).unsqueeze(1)).squeeze(1)
        assert torch.tensor(one.logprobs).sub(wanted).abs().max() < 1e-4


def test_versions_are_taken_up_in_place_and_sampled_from(tmp_path: Path) -> None:
    """The learner's, verified by a probe; the source's own when a unit asks for them again."""
    old, new = (make_model(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    settings = PolicySettings(source=old, dtype="float32")
    actor = RolloutActor(settings, old, PromptSettings(), 1, rollout=ENGINE, verify=True)
    assert actor.setup() == ""
    try:
        first = actor.sample(UNIT).open()
        places = [(one.example_id, one.sample, one.policy_version) for one in first]
        assert places == [(name, k, 0) for name in ("born", "film") for k in range(4)]
        _check(first, old)
        weights = _published(new, 5)
        newer = replace(UNIT, policy_version=5, weights=(Reference(weights),))
        second = actor.sample(newer).open()
        assert {one.policy_version for one in second} == {5}
        assert actor.checksum() == weights.checksum
        _check(second, new)
        damaged = replace(_published(old, 6), checksum=1)
        wrong = replace(UNIT, policy_version=6, weights=(Reference(damaged),))
        with pytest.raises(RuntimeError, match="the weights of version 6 arrived damaged"):
            actor.sample(wrong)
        _check(actor.sample(newer).open(), new)
        with pytest.raises(RuntimeError, match="wants policy version 1, but"):
            actor.sample(replace(UNIT, policy_version=1))
        _check(actor.sample(UNIT).open(), old)
        too_long = replace(UNIT, max_new_tokens=512)
        with pytest.raises(UserError, match=r"no rationale for question born .* do not fit"):
            actor.sample(too_long)
    finally:
        actor._sampler.close()


def test_units_of_one_version_are_sampled_in_one_batch(tmp_path: Path) -> None:
    """Each gets its own samples; those of a newer version are of its weights alone."""
    old, new = (make_model(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    settings = PolicySettings(source=old, dtype="float32")
    actor = RolloutActor(settings, old, PromptSettings(), 1, rollout=ENGINE)
    actor.setup()
    sampler = actor._sampler
    assert isinstance(sampler, VllmSampler)
    widest = 0

    def watched() -> list[Event]:
        nonlocal widest
        widest = max(widest, len(sampler._engine._tasks))
        return step()

    step, sampler._engine.step = sampler._engine.step, watched  # type: ignore[method-assign]
    newer = replace(UNIT, policy_version=5, weights=(Reference(_published(new, 5)),))
    units = [replace(UNIT, unit_id=f"3/{place}", step=place) for place in range(4)]
    units += [replace(newer, unit_id=f"4/{place}", step=place) for place in range(4)]
    try:
        with ThreadPoolExecutor(4) as pool:
            found = [packed.open() for packed in pool.map(actor.sample, units)]
        for unit, rollouts in zip(units, found, strict=True):
            places = [(one.unit_id, one.example_id, one.sample) for one in rollouts]
            assert places == [
                (unit.unit_id, name, k) for name in ("born", "film") for k in range(4)
            ]
            assert {one.policy_version for one in rollouts} == {unit.policy_version}
            _check(rollouts, new if unit.weights else old)
        assert widest > 2, "no two units were in one batch"
    finally:
        sampler.close()


def test_adapters_are_taken_up_without_a_restart(tmp_path: Path) -> None:
    """Those of each version in place of the last one's; the source's own weights without any."""
    source = make_model(tmp_path / "model")
    lora = LoraSettings(rank=4, alpha=8)
    settings = PolicySettings(source=source, dtype="float32", lora=lora)
    actor = RolloutActor(
        settings, source, PromptSettings(), 1, rollout=ENGINE, trains=True, verify=True
    )
    actor.setup()
    try:
        _check(actor.sample(UNIT).open(), source)
        engine = actor._sampler
        for version in (1, 2):
            learner = add_adapters(plain(source, "float32"), lora, seed=0)
            torch.manual_seed(version)
            with torch.no_grad():
                trained = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
                for _, parameter in trained:
                    parameter.normal_(std=0.3)
            nbytes = sum(p.numel() * p.element_size() for _, p in trained)
            weights = pack_weights(trained, nbytes, version)
            unit = replace(UNIT, policy_version=version, weights=(Reference(weights),))
            _check_against(learner, actor.sample(unit).open())
            assert actor.checksum() == weights.checksum
        assert actor._sampler is engine
        _check(actor.sample(UNIT).open(), source)
    finally:
        actor._sampler.close()


def test_what_vllm_holds_is_compared_with_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that kept its old weights is found, which no checksum of tensors would."""
    old, new = (make_model(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    settings = PolicySettings(source=old, dtype="float32")
    actor = RolloutActor(settings, old, PromptSettings(), 1, rollout=ENGINE, verify=True)
    actor.setup()
    try:
        monkeypatch.setattr(
            "lmcot.models.generation.vllm_weights._pack_tied_layers", lambda model: None
        )
        unit = replace(UNIT, policy_version=5, weights=(Reference(_published(new, 5)),))
        with pytest.raises(RuntimeError, match="log-probabilities of version 5 differ by"):
            actor.sample(unit)
    finally:
        actor._sampler.close()
