"""What lies between the attention of a model, compiled: projections, activations and norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lmcot.errors import UserError
from lmcot.models.sources import device

_MOST_VARIANTS = 32
"""How often a part may be compiled: with and without gradients, for each model, for one row and for
several. torch would run it uncompiled after eight."""


def compile_parts(models: Sequence[nn.Module]) -> None:
    """Has the parts of each block that are not attention compiled at their first use.

    Blocks of one model share what is compiled, for all lengths. Names of parameters stay.

    Raises:
        UserError: if there is no C++ compiler to compile with, or a model names no blocks.
    """
    check_compiler()
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    for model in models:
        parts = [part for block in _blocks(model) for part in _parts(block)]
        if not parts:
            raise UserError(
                f"learner.compile is on, but {type(model).__name__} has no blocks that "
                "can be compiled: turn it off"
            )
        for part in parts:
            part.compile(dynamic=True)


def check_compiler() -> None:
    """Refuses a machine without a C++ compiler, where torch compiles for the CPU.

    Raises:
        UserError: with what is missing.
    """
    if device().type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "learner.compile is on, but there is no C++ compiler on this machine: install g++, or "
            "turn it off"
        ) from error


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a transformer, by the names that transformers gives to what it never splits."""
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    return (module for module in model.modules() if type(module).__name__ in names)


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a block that hold no attention."""
    for child in block.children():
        if not any("Attention" in type(one).__name__ for one in child.modules()):
            yield child
        elif "Attention" not in type(child).__name__:
            yield from _parts(child)
