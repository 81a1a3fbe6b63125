"""The resource plan of the service's replicas."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from lmcot.actors.resources.packing import Node, fits
from lmcot.actors.resources.plan import Plan, Roles, make_plan
from lmcot.config import Config, RoleSettings, ServedRole

_COMPUTES, _WAITS = 1.0, 0.1
"""CPUs of a replica if the settings leave them open."""


def find_served_plan(
    config: Config, nodes: Sequence[Node], held: Mapping[str, float] | None = None
) -> Plan:
    """The resource plan of the service: small LM, frozen LM and ingress.

    Where the settings leave a role's CPUs open, it gets as much less than it would take as the
    nodes have room for.

    Args:
        nodes: with what may be taken on each.
        held: CPUs of a replica of each role that runs already; unset ones keep them.
    """
    return make_plan("serve", _roles(config, nodes, held or {}), nodes, section="serve")


def _roles(config: Config, nodes: Sequence[Node], held: Mapping[str, float]) -> Roles:
    def with_share(hundredths: int, *, most: bool = False) -> Roles:
        return {
            name: _role(role, held.get(name, usual * hundredths / 100), most=most)
            for name, (role, usual) in _served(config).items()
        }

    def shares_that_fit(*, most: bool) -> int:
        """The largest share of the usual CPUs that fits, in hundredths; 0 if none does."""
        return bisect_left(
            range(1, 101), True,
            key=lambda n: fits(list(with_share(n, most=most).values()), nodes) is False,
        )  # fmt: skip

    if config.actors.autoscaling:
        return with_share(100)
    # Replicas that join under load also need room.
    return with_share(shares_that_fit(most=True) or shares_that_fit(most=False) or 1)


def _served(config: Config) -> dict[str, tuple[ServedRole, float]]:
    """Each role's settings and usual CPUs."""
    settings = config.serve
    computes = config.frozen is None or config.frozen.local_source is not None
    return {
        "small": (settings.small, _COMPUTES),
        "frozen": (settings.frozen, _COMPUTES if computes else _WAITS),
        "ingress": (settings.ingress, _WAITS),
    }


def _role(role: ServedRole, open_cpus: float, *, most: bool) -> RoleSettings:
    return RoleSettings.model_construct(
        count=(role.max_replicas or role.replicas) if most else role.replicas,
        cpus=round(open_cpus, 4) if role.cpus is None else role.cpus,
        gpus=role.gpus,
        resources=role.resources,
        placement="PACK",
    )
