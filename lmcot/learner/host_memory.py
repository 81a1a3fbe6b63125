"""Host memory between two steps."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release_free_memory() -> None:
    """Gives memory that was freed back to the system, where the C library keeps it (glibc does).

    Micro-batches are of other lengths at every step. What one leaves does not fit the next, and
    glibc takes more beside it: a learner of 135 million parameters grew to twice its size.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
