"""Finds out whether actors fit on nodes together, by Ray's arithmetic and a bounded search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lmcot.config import RoleSettings

GRAIN = 10_000
"""Units per resource in Ray's arithmetic."""
_UNITS = {"GPU", "neuron_cores", "TPU", "NPU", "HPU", "RBLN", "FURIOSA", "TTNPU", "MBLT"}
"""Resources that are devices: an actor takes a share of one, or several whole ones."""
_BARE = {"CPU": 0.001}
_EFFORT = 10_000
"""Number of arrangements that are tried before the search gives up."""

_Free = tuple[tuple[int, ...], ...]
"""Free amounts on a node for each resource: one for each device, or a single amount."""
_Cluster = tuple[tuple[bool, _Free], ...]
"""All nodes, sorted since nodes with the same free amounts are interchangeable; each says whether
it holds an actor of the role being placed, if its strategy asks for that."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster, and its resources by Ray's names."""

    name: str
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Actor:
    """One actor to place on a node."""

    needs: tuple[int, ...]
    strategy: str
    first: bool
    """Whether it is the first of its role."""


def bundle(role: RoleSettings) -> dict[str, float]:
    """The bundle of a placement group for one actor; Ray refuses an empty one."""
    return role.takes or dict(_BARE)


def amounts(resources: Mapping[str, float]) -> str:
    """A text such as ``8 CPUs and 1 GPU``."""
    parts = [
        f"{amount:g} {name}{'s' if name in ('CPU', 'GPU') and amount != 1 else ''}"
        for name, amount in resources.items()
    ]
    return listed(parts)


def listed(parts: Sequence[str]) -> str:
    """A text such as ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def grains(amount: float) -> int:
    """An amount in the units of Ray's arithmetic."""
    return round(amount * GRAIN)


def capacity(role: RoleSettings, node: Node) -> int:
    """Number of actors of a role that an otherwise empty node holds."""
    return min(
        _times(name, amount, node.resources.get(name, 0.0)) for name, amount in bundle(role).items()
    )


def fits(
    roles: Sequence[RoleSettings], nodes: Sequence[Node], *, effort: int = _EFFORT
) -> bool | None:
    """Whether all actors fit together.

    The first arrangement that is tried puts the largest actors first, each where least is left;
    then all others follow, so that a refusal is certain.

    Args:
        effort: after how many arrangements to give up.

    Returns:
        None if it was not found out.
    """
    names = sorted({name for role in roles for name in bundle(role)})
    actors = _largest_first(roles, nodes, names)
    cluster = tuple(sorted((False, tuple(_devices(n, node) for n in names)) for node in nodes))
    totals = [sum(sum(free[i]) for _, free in cluster) or 1 for i in range(len(names))]
    seen: set[tuple[int, _Cluster]] = set()
    trail = [iter([cluster])]
    while trail:
        reached = next(trail[-1], None)
        if reached is None:
            trail.pop()
            continue
        depth = len(trail) - 1
        if depth == len(actors):
            return True
        if (depth, reached) in seen:
            continue
        seen.add((depth, reached))
        # The first descent may take as long as there are actors.
        if len(seen) > effort + len(actors):
            return None
        trail.append(_placed(actors[depth], reached, names, totals))
    return False


def _times(name: str, amount: float, there: float) -> int:
    need, have = grains(amount), grains(there)
    if name in _UNITS and need < GRAIN:
        return (have // GRAIN) * (GRAIN // need) + (have % GRAIN) // need
    return have // need


def _devices(name: str, node: Node) -> tuple[int, ...]:
    """A node's amounts of one resource before anything is placed."""
    amount = grains(node.resources.get(name, 0.0))
    if name not in _UNITS:
        return (amount,)
    whole, rest = divmod(amount, GRAIN)
    return tuple(one for one in (rest, *[GRAIN] * whole) if one)


def _largest_first(
    roles: Sequence[RoleSettings], nodes: Sequence[Node], names: Sequence[str]
) -> list[_Actor]:
    """All actors, role by role; their size is the largest share of any node's resources."""
    most = {name: max((n.resources.get(name, 0.0) for n in nodes), default=0.0) for name in names}

    def size(role: RoleSettings) -> float:
        together = role.count if role.placement == "STRICT_PACK" else 1
        return max(together * amount / (most[n] or 1e-9) for n, amount in bundle(role).items())

    actors = []
    for role in sorted(roles, key=size, reverse=True):
        needs = tuple(grains(bundle(role).get(name, 0.0)) for name in names)
        actors += [_Actor(needs, role.placement, number == 0) for number in range(role.count)]
    return actors


def _placed(
    actor: _Actor, before: _Cluster, names: Sequence[str], totals: Sequence[int]
) -> Iterator[_Cluster]:
    """The clusters that result from placing one more actor, first where least is left."""
    if actor.first:
        before = tuple(sorted((False, free) for _, free in before))
    begun = any(held for held, _ in before)
    ways: list[tuple[float, int, _Free]] = []
    for index, (held, free) in enumerate(before):
        if index and before[index - 1] == before[index]:
            continue
        if actor.strategy == "STRICT_PACK" and begun and not held:
            continue
        if actor.strategy == "STRICT_SPREAD" and held:
            continue
        for left in _taken(free, actor.needs, names):
            share = sum(sum(one) / total for one, total in zip(left, totals, strict=True))
            ways.append((share, index, left))
    mark = actor.strategy.startswith("STRICT")
    for _, index, left in sorted(ways):
        yield tuple(sorted((*before[:index], (mark, left), *before[index + 1 :])))


def _taken(free: _Free, needs: tuple[int, ...], names: Sequence[str]) -> Iterator[_Free]:
    """The amounts that a node may have left with one more actor; none if it has no room."""
    return product(*map(_taken_of, names, free, needs))


def _taken_of(name: str, devices: tuple[int, ...], need: int) -> list[tuple[int, ...]]:
    """The amounts that may be left of one resource: the device that gives a share can be chosen."""
    if not need:
        return [devices]
    if name in _UNITS and need >= GRAIN:
        whole = -(-need // GRAIN)
        left = [one for one in devices if one != GRAIN]
        full = len(devices) - len(left)
        return [(*left, *[GRAIN] * (full - whole))] if full >= whole else []
    ways = []
    for one in sorted(set(devices)):
        if one >= need:
            others = list(devices)
            others[others.index(one)] -= need
            ways.append(tuple(sorted(others)))
    return ways
