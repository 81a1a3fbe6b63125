"""The rows of an evaluation: what each is called, and whose rationales it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lmcot.config.base import Row

WITHOUT_POLICY: Final = ("standard", "cot", "control_empty", "control_oracle")
"""Rows that need no rationale of the small LM (``+sc`` taken off)."""
DEFAULT_ROWS: Final[tuple[Row, ...]] = (
    "standard",
    "cot",
    "guided_base",
    "guided_distilled",
    "guided_refined",
    "small_alone",
)
"""Where the settings name none."""
_LABELS = {
    "standard": "frozen LM answers at once",
    "cot": "frozen LM reasons, then answers",
    "guided_base": "guided by the untrained small LM",
    "guided_distilled": "guided by the distilled small LM",
    "guided_refined": "guided by the small LM after PPO",
    "small_alone": "the {policy} small LM answers itself",
    "control_empty": "control: an empty rationale",
    "control_shuffled": "control: the {policy} small LM's rationale for another question",
    "control_masked": "control: the {policy} small LM's rationale, the gold answer masked out",
    "control_oracle": "control: the gold supporting facts as rationale",
}


def plain(row: str) -> str:
    """The row without ``+sc``."""
    return row.removesuffix("+sc")


def votes(row: str) -> bool:
    """Whether a row is one of self-consistency."""
    return row.endswith("+sc")


def policy_of(row: str, policies: Sequence[str]) -> str:
    """The policy whose rationales a row reads; empty where it reads none.

    Args:
        policies: those that there are, least trained first: controls take the most trained one.
    """
    if plain(row) in WITHOUT_POLICY:
        return ""
    return plain(row).removeprefix("guided_") if row.startswith("guided_") else policies[-1]


def label(row: str, policies: Sequence[str], samples: int) -> str:
    """What a row is, for people."""
    text = _LABELS[plain(row)].format(policy=policies[-1])
    return f"{text}, vote of {samples}" if votes(row) else text
