"""LM-guided chain of thought: a small language model reasons, a frozen large one answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lmcot.guide import Guide

__all__ = ["Guide", "__version__"]


def __getattr__(name: str) -> Any:
    """`Guide` brings torch with it: it is imported when it is asked for."""
    if name == "Guide":
        from lmcot.guide import Guide

        return Guide
    raise AttributeError(f"module 'lmcot' has no attribute '{name}'")
