"""LM-guided chain of thought: a small language model reasons, a frozen large one answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from lmcot.version import __version__

if TYPE_CHECKING:
    from lmcot.api.results import Report, ReportRow, Results, Table
    from lmcot.api.stages import annotate, distill, evaluate, refine, reject, settings, train
    from lmcot.errors import Interrupted, UserError
    from lmcot.guide import Guide

__all__ = [
    "Guide",
    "Interrupted",
    "Report",
    "ReportRow",
    "Results",
    "Table",
    "UserError",
    "__version__",
    "annotate",
    "distill",
    "evaluate",
    "refine",
    "reject",
    "settings",
    "train",
]

_HOMES: Final = {
    **dict.fromkeys(("Report", "ReportRow", "Results", "Table"), "lmcot.api.results"),
    **dict.fromkeys(
        ("annotate", "distill", "evaluate", "refine", "reject", "settings", "train"),
        "lmcot.api.stages",
    ),
    **dict.fromkeys(("Interrupted", "UserError"), "lmcot.errors"),
    "Guide": "lmcot.guide",
}
"""The modules of the names above. They are imported when they are asked for, which may take
seconds."""


def __getattr__(name: str) -> Any:
    """Imports what is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lmcot' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
