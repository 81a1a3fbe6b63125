"""The resource plan compares what a stage's actors take with what the nodes have.

It is worked out before an actor starts, since Ray lets actors without room wait in silence.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcot.actors.resources.packing import Node, amounts, bundle, capacity, fits, grains, listed
from lmcot.config import RoleSettings

_REMEDIES = 3
"""Number of settings that a refusal names."""
_REMEDY_EFFORT = 2_000
"""A remedy that takes more than this many arrangements to find is not offered."""
_GIB = 2**30

Roles = Mapping[str, RoleSettings]
"""The settings of roles, by their names below ``actors``."""


@dataclass(frozen=True, slots=True)
class Published:
    """The weights in the object stores while a stage runs."""

    nbytes: int
    """Bytes of one version."""
    versions: int


@dataclass(frozen=True, slots=True)
class Remedy:
    """A setting with which all actors would fit, the others unchanged."""

    role: str
    field: str
    """``count``, ``placement``, ``cpus``, ``gpus`` or ``resources.NAME``."""
    value: Any
    instead: Any
    section: str = "actors"
    """The section of the settings."""

    def __str__(self) -> str:
        value, instead = (_shown(v) for v in (self.value, self.instead))
        field = "replicas" if (self.section, self.field) == ("serve", "count") else self.field
        return f"{self.section}.{self.role}.{field} {value} instead of {instead}"

    def applied(self, roles: Roles) -> dict[str, RoleSettings]:
        """The roles, with this setting applied."""
        role = roles[self.role]
        group, _, name = self.field.partition(".")
        value = {**role.resources, name: self.value} if name else self.value
        return {**roles, self.role: role.model_copy(update={group: value})}


@dataclass(frozen=True, slots=True)
class Plan:
    """A stage's needs, and whether the nodes meet them; made by `make_plan`."""

    stage: str
    roles: Roles
    nodes: Sequence[Node]
    short: str
    """What is known to be short; empty if nothing is."""
    remedies: Sequence[Remedy]
    notices: Sequence[str]
    """Sentences about what may still go wrong."""
    section: str = "actors"
    """The section of the settings that the roles are in."""

    @property
    def refusal(self) -> str:
        """One sentence: what is short, and which settings would fix it."""
        return (
            f"the actors of '{self.stage}' do not fit on the cluster ({self.short}): {self._advice}"
        )

    @property
    def _advice(self) -> str:
        settings = listed([f"{self.section}.{name}" for name in self.roles])
        lower = f"lower several settings of {settings}"
        use = f"use {' or '.join(map(str, self.remedies))}" if self.remedies else lower
        return f"{use}, or add nodes"

    @property
    def summary(self) -> str:
        """One line: how much of the cluster each role takes."""
        who = ", ".join(f"{role.count} {name}" for name, role in self.roles.items())
        there = totals(self.nodes)
        what = ", ".join(
            f"{amount:g} of {there.get(name, 0.0):g} {name}"
            for name, amount in needed(self.roles).items()
        )
        where = self.nodes[0].name if len(self.nodes) == 1 else f"{len(self.nodes)} nodes"
        return f"{self.stage}: actors ({who}) take {what} on {where}"

    def as_json(self) -> dict[str, Any]:
        """The same as `describe`, for programs."""
        return {
            "stage": self.stage,
            "fits": not self.short,
            "short": self.short,
            "remedies": [str(one) for one in self.remedies],
            "roles": {
                name: {
                    "count": role.count, "each_takes": bundle(role), "placement": role.placement
                }
                for name, role in self.roles.items()
            },
            "nodes": [
                {"name": node.name, "resources": dict(node.resources),
                 "object_store": _object_store(node)}
                for node in self.nodes
            ],
            "notices": list(self.notices),
        }  # fmt: skip

    def describe(self) -> str:
        """Tables of the roles and nodes, and the verdict."""
        roles = [("role", "count", "each takes", "all take", "strategy")]
        for name, role in self.roles.items():
            one = bundle(role)
            all_of_them = amounts({key: role.count * amount for key, amount in one.items()})
            roles.append((name, str(role.count), amounts(one), all_of_them, role.placement))
        names = list(dict.fromkeys(["CPU", "GPU", *needed(self.roles)]))
        nodes = [("node", *names, "object store")]
        for node in self.nodes:
            has = [f"{node.resources.get(name, 0.0):g}" for name in names]
            nodes.append((node.name, *has, f"{_object_store(node) / _GIB:.2f} GiB"))
        verdict = f"does not fit ({self.short}): {self._advice}" if self.short else "fits"
        return "\n".join(
            [self.stage, *_table(roles), "", *_table(nodes), "", verdict, *self.notices]
        )


def make_plan(
    stage: str,
    roles: Roles,
    nodes: Sequence[Node],
    published: Published | None = None,
    section: str = "actors",
) -> Plan:
    """Finds out whether all actors of a stage fit together.

    Args:
        roles: what takes part, by the names below ``actors``.
        published: the weights that go through the object stores, if any do.
        section: of the settings that the roles are in.
    """
    notices = []
    settled = _fit(roles, nodes)
    if settled is None:
        notices.append(
            f"{stage}: it was not found out whether all actors fit together: they may wait "
            f"for room up to {section}.start_timeout_s"
        )
    if published is not None and nodes:
        notices += _store_notice(stage, published, nodes)
    if settled is not False:
        return Plan(stage, roles, nodes, "", (), notices, section)
    found = (replace(one, section=section) for one in _remedies(roles, nodes))
    remedies = sorted(found, key=_loss)[:_REMEDIES]
    return Plan(stage, roles, nodes, _shortage(roles, nodes), remedies, notices, section)


def needed(roles: Roles) -> dict[str, float]:
    """The resources that all actors take together, CPUs and GPUs first."""
    names = {name for role in roles.values() for name in bundle(role)}
    return {
        name: math.fsum(role.count * bundle(role).get(name, 0.0) for role in roles.values())
        for name in sorted(names, key=lambda name: (name not in ("CPU", "GPU"), name))
    }


def totals(nodes: Sequence[Node]) -> dict[str, float]:
    """The resources that all nodes have together."""
    names = {name for node in nodes for name in node.resources}
    return {name: math.fsum(n.resources.get(name, 0.0) for n in nodes) for name in names}


def _fit(roles: Roles, nodes: Sequence[Node], **effort: int) -> bool | None:
    """As `fits`, after checks that settle most cases at once."""
    if _short_totals(roles, nodes) or any(_alone(n, r, nodes) for n, r in roles.items()):
        return False
    return fits(list(roles.values()), nodes, **effort)


def _shortage(roles: Roles, nodes: Sequence[Node]) -> str:
    """What is short, for roles that do not fit: totals, or else the roles without room."""
    found = _short_totals(roles, nodes)
    if not found:
        found = [text for name, role in roles.items() if (text := _alone(name, role, nodes))]
    if not found:
        found = [f"{listed(list(roles))} actors fit on the nodes by themselves, but not together"]
    return "; ".join(found)


def _short_totals(roles: Roles, nodes: Sequence[Node]) -> list[str]:
    there = totals(nodes)
    return [
        f"{name}: {amount:g} needed, {there.get(name, 0.0):g} there"
        for name, amount in needed(roles).items()
        if grains(amount) > grains(there.get(name, 0.0))
    ]


def _alone(name: str, role: RoleSettings, nodes: Sequence[Node]) -> str:
    """Why a role does not fit even by itself; empty if it does."""
    room = [capacity(role, node) for node in nodes]
    each, count = amounts(bundle(role)), role.count
    if not any(room):
        return f"no node has {each} for one {name} actor"
    if role.placement == "STRICT_PACK" and max(room) < count:
        return (
            f"no node holds more than {max(room)} of the {count} {name} actors with {each} each, "
            "which STRICT_PACK keeps together"
        )
    apart = sum(map(bool, room))
    if role.placement == "STRICT_SPREAD" and apart < count:
        return (
            f"STRICT_SPREAD wants {count} nodes that have {each} for one {name} actor, {apart} "
            f"{'has' if apart == 1 else 'have'}"
        )
    if sum(room) < count:
        return f"the nodes hold {sum(room)} of the {count} {name} actors with {each} each"
    return ""


def _remedies(roles: Roles, nodes: Sequence[Node]) -> Iterator[Remedy]:
    """For each setting the largest value with which all fit, if there is one."""

    def fitting(remedy: Remedy) -> bool:
        return _fit(remedy.applied(roles), nodes, effort=_REMEDY_EFFORT) is True

    for name, role in roles.items():
        soft = Remedy(name, "placement", role.placement.removeprefix("STRICT_"), role.placement)
        if soft.value != soft.instead and fitting(soft):
            yield soft
        yield from _largest(name, "count", role.count, lambda i: i, fitting)
        yield from _largest(name, "cpus", role.cpus, lambda i: i / 100, fitting)
        # Ranks of one group cannot share a GPU.
        shares = name != "learner" or role.count == 1
        yield from _largest(name, "gpus", role.gpus, _nth_gpus if shares else _less_one, fitting)
        for resource, amount in role.resources.items():
            yield from _largest(name, f"resources.{resource}", amount, lambda i: i / 100, fitting)


def _largest(
    role: str,
    field: str,
    instead: float,
    nth: Callable[[int], float],
    fitting: Callable[[Remedy], bool],
) -> Iterator[Remedy]:
    """The largest of ``nth(1), nth(2), ...`` below ``instead`` with which the plan fits.

    The less is taken the better it fits, so it is found by bisection.
    """
    below = range(1, bisect_left(range(1, math.ceil(instead * 100) + 1), instead, key=nth) + 1)
    found = bisect_left(
        below, True, key=lambda i: not fitting(Remedy(role, field, nth(i), instead))
    )
    if found:
        yield Remedy(role, field, nth(below[found - 1]), instead)


def _nth_gpus(index: int) -> float:
    """Zero, then shares of one GPU in hundredths, then whole GPUs."""
    return (index - 1) / 100 if index <= 100 else index - 100


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _less_one(index: int) -> float:
    return index - 1


def _loss(remedy: Remedy) -> float:
    """The share that a remedy takes away; another placement takes nothing."""
    return 0.0 if remedy.field == "placement" else 1 - remedy.value / remedy.instead


def _object_store(node: Node) -> float:
    return node.resources.get("object_store_memory", 0.0)


def _store_notice(stage: str, published: Published, nodes: Sequence[Node]) -> list[str]:
    smallest = min(nodes, key=_object_store)
    held = published.versions * published.nbytes
    if held <= _object_store(smallest):
        return []
    lower = ", or lower refine.max_staleness" if published.versions > 2 else ""
    return [
        f"{stage}: {published.versions} versions of the weights take {held / _GIB:.2f} GiB, but "
        f"the object store of {smallest.name} has {_object_store(smallest) / _GIB:.2f} GiB: raise "
        f"actors.object_store_gib (on a joined cluster Ray's --object-store-memory){lower}"
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [f"  {line}".rstrip() for line in lines]
