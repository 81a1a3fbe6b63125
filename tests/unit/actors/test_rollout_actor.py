"""Rollout actors, as plain objects: what they sample, with which weights, and how they fail."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lmcot.actors import rollout_actor, samplers
from lmcot.actors.base import RemoteError
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import Packed, RolloutUnit
from lmcot.actors.weights import Weights, checksum, pack_weights
from lmcot.config import LoraSettings, PolicySettings, PromptSettings
from lmcot.errors import UserError
from lmcot.models.generation.requests import Generated, SampleRequest
from lmcot.records import Example, Failure, Rollout
from tests.conftest import TinyModel

BOTH = pytest.mark.parametrize("kind", ["llama", "t5"])
PROMPT_IDS = {
    "born": (30, 40, 50, 60),
    "film": (70, 80),
    "album": tuple(range(20, 80)),
    "long": (30,) * 2037,
    "fits": (30,) * 2036,
}


def _questions(*names: str) -> Packed[tuple[Example, ...]]:
    return Packed.of(tuple(Example(name, "?", "!", ()) for name in names))


NAMES = ("born", "film", "album")
UNIT = RolloutUnit(
    unit_id="3/0",
    questions=_questions(*NAMES),
    samples=4,
    temperature=1.0,
    max_new_tokens=12,
    seed=7,
    step=3,
    policy_version=0,
)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Without Ray: what it would fetch is handed over, and this process stays as it is."""
    monkeypatch.setattr("ray.get", lambda given: given.weights)
    monkeypatch.setattr(rollout_actor, "use_threads", lambda threads: None)
    monkeypatch.setattr(RolloutActor, "_prompt_ids", lambda self, example: PROMPT_IDS[example.id])


def _actor(kind: str, lora: LoraSettings | None = None, *, verify: bool = False) -> RolloutActor:
    source = f"random:{kind}"
    settings = PolicySettings(source=source, dtype="float32", lora=lora)
    actor = RolloutActor(settings, source, PromptSettings(), 1, trains=True, verify=verify)
    actor.setup()
    return actor


@dataclass
class Reference:
    """What stands for an object in Ray's store."""

    weights: Weights

    number: int = field(default_factory=count().__next__)
    """An id that none before had: `id()` comes again once an object is gone."""

    def hex(self) -> str:
        return str(self.number)


def _published(model: nn.Module, version: int, shift: float = 0.0) -> Weights:
    """A version as the learner packs it: what trains, moved a little."""
    generator = torch.Generator().manual_seed(version)
    trained = {
        name: p.detach() + shift * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    nbytes = sum(p.numel() * p.element_size() for p in trained.values())
    return pack_weights(trained.items(), nbytes, version)


def _model(actor: RolloutActor) -> nn.Module:
    assert isinstance(actor._sampler, samplers.TransformersSampler)
    return actor._sampler.model


def _sample(actor: RolloutActor, unit: RolloutUnit) -> list[Rollout]:
    return actor.sample(unit).open()


def _responses(rollouts: Sequence[Rollout]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(one.example_id, one.sample): one.response_ids for one in rollouts}


@BOTH
def test_a_unit_comes_out_the_same_whatever_came_before(kind: str) -> None:
    """To the bit: the same rollouts again, after other units, and from another actor."""
    actor = _actor(kind)
    first = _sample(actor, UNIT)
    assert _sample(actor, UNIT) == first
    others = _sample(
        actor, replace(UNIT, unit_id="4/0", step=4, questions=_questions(*NAMES[::-1]))
    )
    assert _sample(actor, UNIT) == first
    assert _sample(_actor(kind), UNIT) == first
    assert _responses(others) != _responses(first), "another step draws anew"


@BOTH
def test_rollouts_are_k_for_each_question_in_order(tiny: TinyModel, kind: str) -> None:
    tokenizer = tiny(kind)[1]
    rollouts = _sample(_actor(kind), UNIT)
    places = [(one.example_id, one.sample) for one in rollouts]
    assert places == [(name, k) for name in NAMES for k in range(4)]
    assert len({one.response_ids for one in rollouts}) == 12, "no two draw alike"
    for one in rollouts:
        assert (one.unit_id, one.policy_version) == ("3/0", 0)
        assert one.prompt_ids == PROMPT_IDS[one.example_id]
        assert len(one.logprobs) == len(one.response_ids) <= 12
        ended = one.response_ids[-1] == tokenizer.eos_token_id
        assert one.finish_reason == ("eos" if ended else "length")
        assert one.text == tokenizer.decode(one.response_ids, skip_special_tokens=True).strip()


@BOTH
def test_a_question_is_sampled_alike_in_any_unit(kind: str) -> None:
    """Seeds are those of (run, step, question, k): how questions are cut does not matter."""
    actor = _actor(kind)
    together = _responses(_sample(actor, UNIT))
    apart: dict[tuple[str, int], tuple[int, ...]] = {}
    for name in NAMES:
        unit = replace(UNIT, unit_id=name, questions=_questions(name))
        apart |= _responses(_sample(actor, unit))
    assert apart == together


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8)], ids=["whole", "lora"])
@BOTH
def test_new_weights_change_what_is_sampled(kind: str, lora: LoraSettings | None) -> None:
    """[27] a version is sampled with once it is taken up, and the old one when it comes back."""
    actor = _actor(kind, lora)
    first = _sample(actor, UNIT)
    old, new = _published(_model(actor), 2), _published(_model(actor), 1, shift=0.1)
    newer = replace(UNIT, policy_version=1, weights=(Reference(new),))
    second = _sample(actor, newer)
    assert actor.checksum() == new.checksum != old.checksum
    assert {one.policy_version for one in second} == {1}
    assert _responses(second) != _responses(first)
    assert second != _sample(actor, replace(newer, seed=8))
    third = _sample(actor, replace(UNIT, policy_version=2, weights=(Reference(old),)))
    assert [replace(one, policy_version=0) for one in third] == first
    assert _sample(actor, newer) == second, "a lost unit's older version comes back with it"
    assert _sample(actor, UNIT) == first, "so does the source"


def test_a_version_counts_anew_after_the_learners_were_restarted() -> None:
    """The object decides, not the number: the same number may mean other weights."""
    actor = _actor("llama")
    units = [
        replace(UNIT, policy_version=3, weights=(Reference(_published(_model(actor), 3, shift)),))
        for shift in (0.1, 0.2)
    ]
    assert _responses(_sample(actor, units[0])) != _responses(_sample(actor, units[1]))


def test_what_was_loaded_is_verified_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """[27] against the learner's checksum; a load that went wrong is not sampled with."""
    actor = _actor("llama", verify=True)
    unit = replace(UNIT, policy_version=1, weights=(Reference(_published(_model(actor), 1, 0.1)),))
    _sample(actor, unit)
    with monkeypatch.context() as patched:
        patched.setattr(samplers, "load_weights", lambda model, weights: None)
        wrong = replace(
            unit, policy_version=2, weights=(Reference(_published(_model(actor), 2, 1)),)
        )
        with pytest.raises(RuntimeError, match=r"after loading version 2, whose checksum is \d+"):
            _sample(actor, wrong)
    assert {one.policy_version for one in _sample(actor, wrong)} == {2}


@BOTH
def test_adapters_that_learnt_nothing_change_nothing(kind: str) -> None:
    """A fresh adapter adds zero: its rollouts are the base's."""
    adapted = _actor(kind, LoraSettings(rank=4, alpha=8))
    assert _responses(_sample(adapted, UNIT)) == _responses(_sample(_actor(kind), UNIT))


def test_another_source_starts_over(tiny: TinyModel) -> None:
    actor = _actor("counting-llama")
    actor.use_weights((Reference(_published(_model(actor), 5, shift=0.1)),))
    actor.use_source("random:llama")
    assert actor.checksum() == checksum(tiny("llama")[0])
    assert _sample(actor, UNIT) == _sample(_actor("llama"), UNIT)


def test_units_of_another_version_are_refused() -> None:
    actor = _actor("llama")
    with pytest.raises(RuntimeError, match=r"wants policy version 1, but .* of version 0"):
        _sample(actor, replace(UNIT, policy_version=1))


@BOTH
def test_a_policy_of_nan_is_the_users_to_mend(kind: str) -> None:
    """The error names question and version; sound weights afterwards meet nothing of it."""
    actor = _actor(kind)
    first = _sample(actor, UNIT)
    sound, unsound = _published(_model(actor), 5), _published(_model(actor), 4, shift=math.nan)
    said = "no rationale for question born from policy version 4: .* not finite numbers"
    with pytest.raises(UserError, match=said):
        _sample(actor, replace(UNIT, policy_version=4, weights=(Reference(unsound),)))
    again = _sample(actor, replace(UNIT, policy_version=5, weights=(Reference(sound),)))
    assert [replace(one, policy_version=0) for one in again] == first


def test_a_prompt_too_long_for_the_model_names_its_question() -> None:
    """And leaves the actor as it was."""
    actor = _actor("llama")
    said = "question long from policy version 0: a prompt of 2037 tokens and 12 .* 2048 positions"
    with pytest.raises(UserError, match=said):
        _sample(actor, replace(UNIT, questions=_questions("born", "long", "film")))
    told = actor.apply(RolloutActor.sample, replace(UNIT, questions=_questions("long")))
    assert isinstance(told, RemoteError)
    assert told.kind == "user"
    assert _sample(actor, UNIT) == _sample(_actor("llama"), UNIT)
    fits = replace(UNIT, questions=_questions("fits"), samples=1)
    assert len(_sample(actor, fits)) == 1


def test_an_actor_that_was_started_anew_asks_to_be_set_up() -> None:
    """Ray may have done so while nobody looked: its unit is done again, it is no error of ours."""
    settings = PolicySettings(source="random:llama", dtype="float32")
    told = RolloutActor(settings, "random:llama", PromptSettings(), 1).apply("sample", unit=UNIT)
    assert isinstance(told, RemoteError)
    assert told.kind == "not set up"


class HeldSampler:
    """Notes what it is asked, and answers a unit only when the test lets it."""

    notice = ""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = frozenset({0})
        self.began: queue.Queue[int] = queue.Queue()
        self.may_end = threading.Semaphore(0)
        self.version = 0
        self.working = 0
        self.asleep = False

    def sleep(self) -> None:
        assert self.working == 0, "a unit is at work"
        assert not self.asleep
        self.asleep = True

    def wake(self) -> None:
        assert self.asleep
        self.asleep = False

    def checksum(self) -> int:
        return self.version

    def close(self) -> None:
        assert self.working == 0

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Generated] | Failure]:
        assert not self.asleep
        self.working += 1
        version = self.version
        self.began.put(version)
        assert self.may_end.acquire(timeout=30)
        assert self.version == version, "the weights changed under a unit"
        self.working -= 1
        return [[Generated((5,), (-1.0,), "length")] * len(one.seeds) for one in requests]

    def load(self, weights: Weights) -> None:
        assert not self.asleep
        assert self.working == 0, "units are at work with the old weights"
        self.version = weights.version


def test_units_of_one_version_are_sampled_together_and_those_of_another_wait() -> None:
    actor = _actor("llama")
    model = _model(actor)
    sampler = HeldSampler(actor._sampler.tokenizer)
    actor._sampler = sampler
    first, second = (Reference(_published(model, version)) for version in (1, 2))
    units = [
        replace(UNIT, unit_id=f"3/{place}", policy_version=reference.weights.version,
                weights=(reference,))
        for place, reference in enumerate((first, first, second, second))
    ]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(actor.sample, unit) for unit in units[:2]]
        assert [sampler.began.get(timeout=30) for _ in range(2)] == [1, 1]
        calls += [pool.submit(actor.sample, unit) for unit in units[2:]]
        sampler.may_end.release()
        with pytest.raises(queue.Empty):
            sampler.began.get(timeout=0.2)
        sampler.may_end.release()
        assert [sampler.began.get(timeout=30) for _ in range(2)] == [2, 2]
        sampler.may_end.release(2)
        for unit, call in zip(units, calls, strict=True):
            found = call.result(timeout=30).open()
            assert {(one.unit_id, one.policy_version) for one in found} == {
                (unit.unit_id, unit.policy_version)
            }
            assert len(found) == len(NAMES) * unit.samples


def test_a_unit_that_fails_lets_the_next_version_in() -> None:
    actor = _actor("llama")
    with pytest.raises(UserError, match="no rationale for question long"):
        actor.sample(replace(UNIT, questions=_questions("long")))
    newer = Reference(_published(_model(actor), 1))
    actor.sample(replace(UNIT, policy_version=1, weights=(newer,)))


def test_an_actor_rests_until_its_next_unit() -> None:
    """It waits for what is being sampled, and takes up new weights awake; a new one may rest."""
    RolloutActor(PolicySettings(source="random:llama"), "random:llama", PromptSettings(), 1).rest()
    actor = _actor("llama")
    before = _sample(actor, UNIT)
    actor.rest()
    actor.rest()
    assert _sample(actor, UNIT) == before

    newer = Reference(_published(_model(actor), 1))
    sampler = HeldSampler(actor._sampler.tokenizer)
    actor._sampler = sampler
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(actor.sample, UNIT)
        sampler.began.get(timeout=30)
        rest = pool.submit(actor.rest)
        with pytest.raises(TimeoutError):
            rest.result(timeout=0.2)
        sampler.may_end.release()
        first.result(timeout=30)
        rest.result(timeout=30)
        assert sampler.asleep
        second = pool.submit(actor.sample, replace(UNIT, policy_version=1, weights=(newer,)))
        assert sampler.began.get(timeout=30) == 1
        sampler.may_end.release()
        second.result(timeout=30)
        assert not sampler.asleep
