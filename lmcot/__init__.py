"""LM-guided chain of thought: a small language model reasons, a frozen large one answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcot.version import __version__

if TYPE_CHECKING:
    from lmcot.guide import Guide

__all__ = ["Guide", "__version__"]


def __getattr__(name: str) -> Any:
    """`Guide` is imported when it is asked for: what it needs takes a second to import."""
    if name == "Guide":
        from lmcot.guide import Guide

        return Guide
    raise AttributeError(f"module 'lmcot' has no attribute '{name}'")
