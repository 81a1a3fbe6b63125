"""DeepSpeed, imported so that it computes where torch does."""

from __future__ import annotations

from lmcot.process import accelerator_named

with accelerator_named():
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_accelerator()

__all__ = ["deepspeed", "get_accelerator"]
