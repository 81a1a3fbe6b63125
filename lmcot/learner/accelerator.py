"""DeepSpeed, imported so that it computes where torch does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_VARIABLE = "DS_ACCELERATOR"


@contextmanager
def accelerator_named() -> Iterator[None]:
    """Names the CPU as the accelerator where there is no GPU: DeepSpeed would guess, and say so.

    DeepSpeed reads the variable once, when it is imported; afterwards it is as it was before.
    """
    if torch.cuda.is_available() or _VARIABLE in os.environ:
        yield
        return
    os.environ[_VARIABLE] = "cpu"
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


with accelerator_named():
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_accelerator()

__all__ = ["deepspeed", "get_accelerator"]
