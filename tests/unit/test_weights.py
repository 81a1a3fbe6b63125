"""Weights on their way from the learner to the rollout actors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from torch import nn

from lmcot.actors.weights import checksum, load_weights, pack_weights
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")


def _noisy(model: nn.Module, seed: int) -> nn.Module:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_weights_arrive_to_the_bit(tiny: TinyModel, kind: str, dtype: torch.dtype) -> None:
    """[27] after a weight sync the checksums of the learner's and the actor's tensors are equal."""
    actor = copy.deepcopy(tiny(kind)[0]).to(dtype)
    learner = _noisy(actor, 1)
    assert checksum(actor) != checksum(learner)
    weights = pickle.loads(pickle.dumps(pack_weights(learner, 7)))
    places = {name: parameter.data_ptr() for name, parameter in actor.named_parameters()}
    load_weights(actor, weights)
    assert weights.version == 7
    assert weights.checksum == checksum(learner) == checksum(actor)
    state = learner.state_dict()
    for name, tensor in actor.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    assert places == {name: p.data_ptr() for name, p in actor.named_parameters()}, "in place"


def test_tied_weights_travel_once(tiny: TinyModel) -> None:
    """[27] tied weights are one tensor on the way, and stay tied on arrival."""
    actor = copy.deepcopy(tiny("llama")[0])
    assert actor.lm_head.weight is actor.model.embed_tokens.weight
    weights = pack_weights(_noisy(actor, 2), 1)
    names = [entry.name for entry in weights.entries]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert weights.buffer.nbytes == 4 * sum(p.numel() for p in actor.parameters())
    load_weights(actor, weights)
    assert actor.lm_head.weight is actor.model.embed_tokens.weight


def test_packing_copies(tiny: TinyModel) -> None:
    """[27] a version does not change after it was packed, though the learner trains on."""
    learner = copy.deepcopy(tiny("llama")[0])
    weights = pack_weights(learner, 0)
    with torch.no_grad():
        next(learner.parameters()).add_(1)
    actor = _noisy(learner, 3)
    load_weights(actor, weights)
    assert checksum(actor) == weights.checksum == checksum(tiny("llama")[0])


def test_read_only_buffers_load_without_a_warning(tiny: TinyModel) -> None:
    """[27] Ray hands out the object store's memory read-only."""
    learner = tiny("llama")[0]
    weights = pack_weights(learner, 0)
    weights.buffer.setflags(write=False)
    actor = _noisy(learner, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(actor, weights)
    assert checksum(actor) == weights.checksum


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_checksum_detects_damage(tiny: TinyModel, place: int) -> None:
    """[27] one changed bit is found, and nothing of the damaged version is taken up."""
    learner = tiny("llama")[0]
    weights = pack_weights(learner, 5)
    weights.buffer[place] ^= 1
    actor = _noisy(learner, 5)
    before = checksum(actor)
    with pytest.raises(RuntimeError, match="version 5 arrived damaged"):
        load_weights(actor, weights)
    assert checksum(actor) == before


def test_weights_of_another_architecture_are_refused(tiny: TinyModel) -> None:
    """[27] other names: refused, untouched."""
    actor = copy.deepcopy(tiny("t5")[0])
    before = checksum(actor)
    with pytest.raises(RuntimeError, match="another architecture"):
        load_weights(actor, pack_weights(tiny("llama")[0], 0))
    assert checksum(actor) == before


def test_weights_of_another_shape_are_refused() -> None:
    """[27] equal names but other shapes: refused, also where torch would broadcast; untouched."""
    actor = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    before = checksum(actor)
    for other in (nn.Linear(4, 1), nn.Linear(4, 5)):
        with pytest.raises(RuntimeError, match="shape"):
            load_weights(actor, pack_weights(nn.Sequential(nn.Linear(4, 4), other), 0))
        assert checksum(actor) == before


def test_every_entry_lies_where_it_says(tiny: TinyModel) -> None:
    """[27] entries follow one another without gap or overlap."""
    weights = pack_weights(tiny("t5")[0], 0)
    end = 0
    for entry in weights.entries:
        assert dataclasses.astuple(entry)[3] == end == entry.offset
        end += entry.nbytes
    assert end == weights.buffer.nbytes
