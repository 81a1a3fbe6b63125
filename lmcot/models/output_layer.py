"""Applies the output layer only at chosen positions; it is a small model's largest product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def output_at(output: nn.Module, where: Tensor) -> Iterator[list[Tensor]]:
    """Makes the output layer read [1, tokens, width] instead of [rows, length, width]."""
    seen: list[Tensor] = []

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(arguments[0][where[0], where[1]])
        return (seen[-1].unsqueeze(0),)

    handle = output.register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()
