"""How the rows of one optimiser step are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row indices in groups of at most ``size``, rows of similar length together.

    Longest first, so that what does not fit into memory shows at once. The grouping is a function
    of the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + size] for start in range(0, len(order), size)]


def split_evenly(rows: Sequence[int], parts: int) -> list[list[int]]:
    """Cuts rows into so many consecutive parts whose sizes differ by one at most."""
    base, larger = divmod(len(rows), parts)
    result, start = [], 0
    for part in range(parts):
        end = start + base + (part < larger)
        result.append(list(rows[start:end]))
        start = end
    return [part for part in result if part]
