"""Weights on their way from the learner to the rollout actors."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lmcot.actors.weights import ALIGNMENT, Weights, checksum, load_weights, pack_weights
from lmcot.config import LoraSettings
from lmcot.models.adapters import add_adapters
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")


def _noisy(model: nn.Module, seed: int) -> nn.Module:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return changed


def _packed(model: nn.Module, version: int = 0) -> Weights:
    """As the learner packs them: what trains, and its size beforehand."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    nbytes = sum(p.numel() * p.element_size() for _, p in trained)
    return pack_weights(iter(trained), nbytes, version)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_weights_arrive_to_the_bit(tiny: TinyModel, kind: str, dtype: torch.dtype) -> None:
    """[27] after a weight sync the checksums of the learner's and the actor's tensors are equal."""
    actor = copy.deepcopy(tiny(kind)[0]).to(dtype)
    learner = _noisy(actor, 1)
    assert checksum(actor) != checksum(learner)
    weights = pickle.loads(pickle.dumps(_packed(learner, 7)))
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
    weights = _packed(_noisy(actor, 2), 1)
    names = [entry.name for entry in weights.entries]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    parameters = sum(p.numel() for p in actor.parameters())
    assert sum(entry.nbytes for entry in weights.entries) == 4 * parameters
    load_weights(actor, weights)
    assert actor.lm_head.weight is actor.model.embed_tokens.weight


def test_packing_copies(tiny: TinyModel) -> None:
    """[27] a version does not change after it was packed, though the learner trains on."""
    learner = copy.deepcopy(tiny("llama")[0])
    weights = _packed(learner)
    with torch.no_grad():
        next(learner.parameters()).add_(1)
    actor = _noisy(learner, 3)
    load_weights(actor, weights)
    assert checksum(actor) == weights.checksum == checksum(tiny("llama")[0])


def test_read_only_buffers_load_without_a_warning(tiny: TinyModel) -> None:
    """[27] Ray hands out the object store's memory read-only."""
    learner = tiny("llama")[0]
    weights = _packed(learner)
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
    weights = _packed(learner, 5)
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
        load_weights(actor, _packed(tiny("llama")[0]))
    assert checksum(actor) == before


def test_weights_of_another_shape_are_refused() -> None:
    """[27] equal names but other shapes: refused, also where torch would broadcast; untouched."""
    actor = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    before = checksum(actor)
    for other in (nn.Linear(4, 1), nn.Linear(4, 5)):
        with pytest.raises(RuntimeError, match="shape"):
            load_weights(actor, _packed(nn.Sequential(nn.Linear(4, 4), other)))
        assert checksum(actor) == before


def test_weights_of_another_dtype_are_refused() -> None:
    """[27] a converted tensor would not be the learner's to the bit: refused, untouched."""
    actor = nn.Linear(4, 4)
    before = checksum(actor)
    with pytest.raises(RuntimeError, match="another dtype"):
        load_weights(actor, _packed(nn.Linear(4, 4).bfloat16()))
    assert checksum(actor) == before


def _odd(seed: int = 0) -> nn.ParameterDict:
    """Tensors of sizes that fit no alignment: scalars, three dtypes, one not contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return nn.ParameterDict(
        {
            "a": noise(3, dtype=torch.bfloat16),
            "b": noise(),
            "c": noise(5, 7, dtype=torch.float64),
            "d": noise(7, 5).T,
            "e": noise(dtype=torch.bfloat16),
            "f": noise(1, 33),
        }
    )


def test_every_entry_lies_where_it_says(tiny: TinyModel) -> None:
    """[27] entries follow one another, aligned, without overlap, and with nothing in the gaps."""
    for module in (tiny("t5")[0], _odd()):
        weights = _packed(module)
        end = 0
        for entry in weights.entries:
            assert entry.offset % ALIGNMENT == 0
            assert 0 <= entry.offset - end < ALIGNMENT
            assert not weights.buffer[end : entry.offset].any()
            end = entry.offset + entry.nbytes
        assert end == weights.buffer.nbytes


def test_odd_sizes_arrive_to_the_bit() -> None:
    """[27] scalars, odd sizes, mixed dtypes and transposed tensors, from read-only memory."""
    learner, actor = _odd(1), _odd(2)
    weights = pickle.loads(pickle.dumps(_packed(learner), protocol=5))
    weights.buffer.setflags(write=False)
    load_weights(actor, weights)
    assert all(torch.equal(actor[name], learner[name]) for name in learner)
    assert checksum(actor) == checksum(learner) == weights.checksum


def test_only_what_was_packed_travels() -> None:
    """[27] the room kept for alignment stays behind, in Ray's out-of-band format too."""
    weights = _packed(_odd())
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(weights, protocol=5, buffer_callback=buffers.append)
    assert [buffer.raw().nbytes for buffer in buffers] == [weights.buffer.nbytes]
    assert weights.buffer.nbytes < sum(e.nbytes + ALIGNMENT for e in weights.entries)


def test_loading_copies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """[27] tensors are read where they lie: on memory that changes later, they would too."""
    learner, actor = _odd(1), _odd(2)
    weights = _packed(learner)
    sources: list[int] = []
    copy_ = torch.Tensor.copy_

    def noted(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        sources.append(source.data_ptr())
        return copy_(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    load_weights(actor, weights)
    start = weights.buffer.ctypes.data
    assert sources == [start + entry.offset for entry in weights.entries]


@pytest.mark.parametrize("difference", [-(2**23), -64, -1, 1, 4096])
def test_another_size_than_announced_is_refused(difference: int) -> None:
    """[27] a tensor that is missing, or one too many, is noticed where it is packed."""
    tensors = {"weight": torch.ones(4, 2**20), "bias": torch.zeros(4)}
    nbytes = 2**24 + 16
    pack_weights(tensors.items(), nbytes, 0)
    with pytest.raises(RuntimeError, match=r"the weights have .* bytes.* announced"):
        pack_weights(tensors.items(), nbytes + difference, 0)


def test_tensors_are_taken_one_at_a_time() -> None:
    """[28] each is copied before the next is asked for: at stage 3 it is gone by then."""
    whole = torch.empty(4)

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(3):
            yield str(number), whole.fill_(number)
            whole.fill_(torch.nan)

    weights = pack_weights(gathered(), 48, 0)
    pieces = [weights.buffer[entry.place].view("float32").tolist() for entry in weights.entries]
    assert pieces == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_only_adapters_travel(tiny: TinyModel, kind: str) -> None:
    """[27] under LoRA a version is the adapters alone, and the actor's base stays as it is."""
    settings = LoraSettings(rank=1, alpha=2)
    learner = add_adapters(copy.deepcopy(tiny(kind)[0]), settings, seed=0)
    actor = add_adapters(copy.deepcopy(tiny(kind)[0]), settings, seed=1)
    base = {n: p.clone() for n, p in actor.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(1)
    weights = _packed(learner, 3)
    assert checksum(actor) != checksum(learner)
    assert {entry.name.rsplit(".", 3)[-3] for entry in weights.entries} == {"lora_A", "lora_B"}
    everything = sum(p.numel() * p.element_size() for p in learner.parameters())
    assert 0 < weights.buffer.nbytes < everything / 20
    load_weights(actor, weights)
    assert weights.checksum == checksum(learner) == checksum(actor)
    for (name, ours), theirs in zip(actor.named_parameters(), learner.parameters(), strict=True):
        assert torch.equal(ours, base.get(name, theirs))


def test_a_model_without_the_adapters_refuses_them(tiny: TinyModel) -> None:
    """[27] an actor that was set up without LoRA does not take a LoRA learner's version."""
    learner = add_adapters(copy.deepcopy(tiny("llama")[0]), LoraSettings(rank=1), seed=0)
    with pytest.raises(RuntimeError, match="names differ"):
        load_weights(copy.deepcopy(tiny("llama")[0]), _packed(learner))


def test_what_does_not_train_does_not_travel() -> None:
    """[27] a frozen layer is in no version, and is left alone by one."""
    learner, actor = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)) for _ in range(2))
    for model in (learner, actor):
        model[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in actor.state_dict().items()}
    weights = _packed(learner)
    assert [entry.name for entry in weights.entries] == ["1.weight", "1.bias"]
    load_weights(actor, weights)
    after = {**before, **{n: t for n, t in learner.state_dict().items() if n.startswith("1.")}}
    assert all(torch.equal(tensor, after[name]) for name, tensor in actor.state_dict().items())
