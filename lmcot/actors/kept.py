"""Results that stay in the object store: the driver holds references to them, and passes those on.

The driver owns them. A value outlives the actor that made it, but is lost with the node that holds
it; small ones (under 100 KB) Ray keeps beside the reference itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ObjectLostError

_Value = TypeVar("_Value")
_Told = TypeVar("_Told")


@dataclass(frozen=True, slots=True)
class Kept(Generic[_Value]):
    """A value in the object store. Ray does not fetch it on the way, since it is in a record."""

    ref: Any


@dataclass(frozen=True, slots=True)
class Split(Generic[_Told]):
    """The result of an actor's method: what the driver reads, and values that are kept."""

    told: _Told
    kept: tuple[Any, ...]


def fetch(values: Sequence[Kept[_Value]]) -> list[_Value | None]:
    """The values, in order; None for each that is lost."""
    refs = [one.ref for one in values]
    try:
        return list(ray.get(refs))
    except ObjectLostError:
        return [_found(ref) for ref in refs]


def _found(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ObjectLostError:
        return None
