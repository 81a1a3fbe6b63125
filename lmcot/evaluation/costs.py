"""The arithmetic that an answer costs, and the large LMs for which guidance is cheaper.

It counts 2 operations per parameter and token, read or written (Kaplan et al. 2020, section 2.1;
attention is left out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcot.config.rows import BASELINE, REASONING

BILLION = 10**9
SIZES = tuple(size * BILLION for size in (1, 7, 11, 70, 175))
"""Parameters of the large LMs whose costs are reported, beside the one that was asked."""
_COMPARISONS = (
    (REASONING, "of_cot", "break_even"),
    (BASELINE, "of_standard", "break_even_of_standard"),
)
"""The rows that costs are compared with, and the keys of the shares and of the sizes."""


def flops(large: int | None, large_tokens: float, small: int, small_tokens: float) -> float | None:
    """Operations of both models; None if the large one's size is needed and unknown.

    Args:
        large, small: their parameters.
    """
    if large is None and large_tokens:
        return None
    return 2.0 * ((large or 0) * large_tokens + small * small_tokens)


def break_even(
    small: int, small_tokens: float, large_tokens: float, others_large_tokens: float
) -> float | None:
    """Size of the large LM above which a row is cheaper than another that uses no small LM.

    The tokens that the large LM saves pay for the small LM's work: s t_s / (t' - t), with s the
    small LM's parameters and t_s its tokens, t and t' the large LM's tokens in this row and in the
    other. None if the large LM saves no tokens, so that the row is never cheaper.
    """
    spared = others_large_tokens - large_tokens
    return small * small_tokens / spared if spared > 0 else None


def costs(
    rows: Mapping[str, Mapping[str, Any]], small: int, large: int | None, asked: Mapping[str, int]
) -> dict[str, Any]:
    """The costs of a question by row, for large LMs of several sizes, and compared with ``cot``.

    Args:
        rows: the report's, with the tokens of all their questions.
        asked: number of questions, by row.

    Returns:
        ``rows``: for each row the mean tokens of a question, ``flops`` by size (parameters, as
        text), ``of_cot`` (the same as a share of ``cot``'s) and ``break_even`` against ``cot``, in
        parameters; ``of_standard`` and ``break_even_of_standard`` compare with ``standard``. A row
        is not compared with itself, and with no row that is not there.
    """
    sizes = sorted({*SIZES, *([large] if large else [])})
    found: dict[str, Any] = {}
    for name, row in rows.items():
        tokens = {
            key: row[key] / asked[name]
            for key in (
                "large_lm_tokens_in",
                "large_lm_tokens_out",
                "small_lm_tokens_in",
                "small_lm_tokens_out",
            )
        }
        found[name] = {
            **tokens,
            "requests": row["requests"] / asked[name],
            "cached_requests": row["cached_requests"] / asked[name],
            "seconds": row["seconds"] / asked[name],
            "flops": {
                str(size): flops(size, large_tokens(tokens), small, _small(tokens))
                for size in sizes
            },
        }
    for unguided, share, size_key in _COMPARISONS:
        other = found.get(unguided)
        for name, row in found.items():
            if other is None or name == unguided:
                continue
            row[share] = {size: row["flops"][size] / other["flops"][size] for size in row["flops"]}
            row[size_key] = break_even(small, _small(row), large_tokens(row), large_tokens(other))
    return {"small": small, "large": large, "sizes": sizes, "rows": found}


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other one beats: each is better than all that cost as much
    or less; cheapest first.

    Args:
        points: cost and accuracy by name.
    """
    found: list[str] = []
    for name, (_, accuracy) in sorted(points.items(), key=lambda one: (one[1][0], -one[1][1])):
        if not found or accuracy > points[found[-1]][1]:
            found.append(name)
    return found


def large_tokens(tokens: Mapping[str, Any]) -> float:
    """Tokens that the large LM reads and writes."""
    return float(tokens["large_lm_tokens_in"] + tokens["large_lm_tokens_out"])


def _small(tokens: Mapping[str, Any]) -> float:
    return float(tokens["small_lm_tokens_in"] + tokens["small_lm_tokens_out"])


def size_in_words(size: float) -> str:
    """A number of parameters in short: 135M, 7B."""
    for unit, letter in ((10**12, "T"), (BILLION, "B"), (10**6, "M"), (10**3, "K")):
        if size >= unit:
            return f"{size / unit:.3g}{letter}"
    return f"{size:.0f}"
