"""Weights on their way from the learner to the rollout actors: one object per version."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in the flat buffer (bytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Weights:
    """All trained tensors of a model version in one flat buffer.

    Ray keeps the buffer once per node and gives it to the actors there without a copy.
    """

    version: int
    entries: tuple[TensorEntry, ...]
    buffer: npt.NDArray[np.uint8]
    checksum: int


def pack_weights(tensors: Iterable[tuple[str, Tensor]], nbytes: int, version: int) -> Weights:
    """Copies tensors one after another into one buffer.

    Args:
        nbytes: of all tensors together.
    """
    buffer = np.empty(nbytes, np.uint8)
    entries, offset = [], 0
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        buffer[offset : offset + flat.nbytes] = flat
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, flat.nbytes))
        offset += flat.nbytes
    if offset != nbytes:
        raise RuntimeError(f"the weights have {offset} bytes, not the {nbytes} announced")
    return Weights(version, tuple(entries), buffer, zlib.crc32(buffer.data))


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copies a version's tensors into a model in place: all that trains in it.

    Raises:
        RuntimeError: if names, shapes or checksum do not match.
    """
    parameters = _trained(model)
    if list(parameters) != [entry.name for entry in weights.entries]:
        raise RuntimeError("the weights are those of another architecture: names differ")
    if [tuple(p.shape) for p in parameters.values()] != [e.shape for e in weights.entries]:
        raise RuntimeError("the weights are those of another architecture: shapes differ")
    if zlib.crc32(weights.buffer.data) != weights.checksum:
        raise RuntimeError(f"the weights of version {weights.version} arrived damaged")
    for entry in weights.entries:
        # A copy, for torch wants a writable, aligned array.
        piece = weights.buffer[entry.offset : entry.offset + entry.nbytes].copy()
        source = torch.from_numpy(piece).view(getattr(torch, entry.dtype)).reshape(entry.shape)
        parameters[entry.name].copy_(source)


def checksum(model: nn.Module) -> int:
    """The checksum that a model's trained tensors would travel with."""
    parameters = _trained(model)
    nbytes = sum(p.numel() * p.element_size() for p in parameters.values())
    return pack_weights(parameters.items(), nbytes, 0).checksum


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters; of a model with adapters only theirs. Tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
