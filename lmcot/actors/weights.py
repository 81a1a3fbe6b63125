"""Weights on their way from the learner to the rollout actors: one object per version."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Tensors begin at multiples of it (bytes), as Ray's buffers do: they can be read in place."""

_SPARE = 2**22
"""Room for what alignment adds, enough for 65,536 tensors; memory is only taken where written."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in the flat buffer (bytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def place(self) -> slice:
        """Its bytes in the buffer."""
        return slice(self.offset, self.offset + self.nbytes)


@dataclass(frozen=True, slots=True)
class Weights:
    """All trained tensors of a model version in one flat buffer.

    Ray keeps the buffer once per node and gives it to the actors there without a copy.
    """

    version: int
    entries: tuple[TensorEntry, ...]
    buffer: npt.NDArray[np.uint8]
    checksum: int
    """CRC-32 of the tensors' bytes, one after another, without the gaps between them."""


def pack_weights(tensors: Iterable[tuple[str, Tensor]], nbytes: int, version: int) -> Weights:
    """Copies tensors one after another into one buffer.

    Args:
        nbytes: of all tensors together.

    Raises:
        RuntimeError: if the tensors have more bytes, or fewer.
    """
    buffer = np.zeros(nbytes + _SPARE, np.uint8)
    entries: list[TensorEntry] = []
    found = end = crc = 0
    for name, tensor in tensors:
        piece = _bytes_of(tensor)
        found += piece.nbytes
        if found > nbytes:
            raise RuntimeError(f"the weights have more bytes than the {nbytes} announced")
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + piece.nbytes
        buffer[offset:end] = piece
        crc = zlib.crc32(piece.data, crc)
        shape = tuple(tensor.shape)
        entries.append(TensorEntry(name, _name(tensor.dtype), shape, offset, piece.nbytes))
    if found != nbytes:
        raise RuntimeError(f"the weights have {found} bytes, not the {nbytes} announced")
    return Weights(version, tuple(entries), buffer[:end], crc)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copies a version's tensors into a model in place: all that trains in it.

    Raises:
        RuntimeError: if names, shapes, dtypes or checksum do not match; the model is as before.
    """
    check_weights(model, weights)
    parameters = _trained(model)
    for name, tensor in tensors_of(weights):
        parameters[name].copy_(tensor)


def check_weights(model: nn.Module, weights: Weights) -> None:
    """Checks that a version arrived whole, and that it is one of this model.

    Args:
        model: it may be on the meta device, where it has no weights.

    Raises:
        RuntimeError: if names, shapes, dtypes or checksum do not match.
    """
    _check_fit(_trained(model), weights.entries)
    crc = 0
    for entry in weights.entries:
        crc = zlib.crc32(weights.buffer[entry.place].data, crc)
    if crc != weights.checksum:
        raise RuntimeError(f"the weights of version {weights.version} arrived damaged")


def tensors_of(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """A version's tensors by name, on the buffer's own memory; not to be written to."""
    flat = _in_place(weights.buffer)
    for entry in weights.entries:
        dtype: torch.dtype = getattr(torch, entry.dtype)
        yield entry.name, flat[entry.place].view(dtype).view(entry.shape)


def checksum(model: nn.Module) -> int:
    """The checksum that a model's trained tensors would travel with."""
    crc = 0
    for parameter in _trained(model).values():
        crc = zlib.crc32(_bytes_of(parameter).data, crc)
    return crc


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters; of a model with adapters only theirs. Tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _check_fit(parameters: dict[str, nn.Parameter], entries: tuple[TensorEntry, ...]) -> None:
    if list(parameters) != [entry.name for entry in entries]:
        raise RuntimeError("the weights are those of another architecture: names differ")
    if [tuple(p.shape) for p in parameters.values()] != [entry.shape for entry in entries]:
        raise RuntimeError("the weights are those of another architecture: shapes differ")
    if [_name(p.dtype) for p in parameters.values()] != [entry.dtype for entry in entries]:
        raise RuntimeError("the weights are of another dtype than the model that takes them")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes: its own memory where that is contiguous and on the host."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _in_place(buffer: npt.NDArray[np.uint8]) -> Tensor:
    """A tensor on the buffer's own memory. It is not to be written to: Ray's is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(buffer)
