"""The Ray cluster: joined or started, checked for room, and left as it was found."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private.state import available_resources_per_node
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup

from lmcot.actors.packing import Node
from lmcot.actors.placement import captured_in
from lmcot.actors.plan import Plan, Published, Roles, make_plan
from lmcot.config import ActorsSettings
from lmcot.errors import UserError
from lmcot.monitor.progress import say


@contextmanager
def ray_cluster(settings: ActorsSettings) -> Iterator[None]:
    """Joins the cluster of ``actors.address`` or RAY_ADDRESS, else starts one on this machine.

    A cluster that was started here is ended at the end; a Ray connection that was there before
    stays.

    Raises:
        UserError: if the address does not answer.
    """
    if ray.is_initialized():
        yield
        return
    # Notices that ask nothing of the user would bury the progress.
    for name in ("ray.rllib", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    address = settings.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                object_store_memory=_object_store_bytes(),
            )
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at '{address}' cannot be joined: {str(error).splitlines()[0]}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _object_store_bytes() -> int:
    """A third of what is free in shared memory, at most 4 GiB: weights of a few versions."""
    try:
        stats = os.statvfs("/dev/shm")
        free = stats.f_bavail * stats.f_frsize
    except OSError:
        free = 2**32
    return max(min(2**32, free // 3), 128 * 2**20)


def find_plan(stage: str, roles: Roles, published: Published | None = None) -> Plan:
    """The resource plan of a stage on the cluster as it is now.

    Inside a placement group that captures this process's actors (a trial of Ray Tune) the group
    is all there is, and it has placed its bundles already: strategies say nothing there.
    """
    group = captured_in()
    if group is None:
        return make_plan(stage, roles, nodes(), published)
    free = {
        name: role.model_copy(update={"placement": "PACK"})
        for name, role in roles.items()
        if role.takes
    }
    return make_plan(stage, free, _nodes_of_group(group))


def check_plan(
    stage: str, roles: Roles, settings: ActorsSettings, published: Published | None = None
) -> None:
    """Says what the actors of a stage take, before one waits for room for ever.

    Raises:
        UserError: naming what is short and what would fit, unless nodes may join.
    """
    plan = find_plan(stage, roles, published)
    say(plan.summary)
    for notice in plan.notices:
        say(notice)
    if plan.short and not settings.autoscaling:
        raise UserError(plan.refusal)
    if plan.short:
        say(f"{stage}: short of room ({plan.short}); actors wait for nodes to join")


def nodes(*, free: bool = False) -> list[Node]:
    """The nodes that are alive, by address; where several share one, by their id too.

    Args:
        free: with what nobody has reserved there, instead of all that they have.
    """
    left = available_resources_per_node() if free else {}
    alive = sorted(
        (node for node in ray.nodes() if node["Alive"]),
        key=lambda node: (node["NodeManagerAddress"], node["NodeID"]),
    )
    here = ray.util.get_node_ip_address()
    shared = Counter(node["NodeManagerAddress"] for node in alive)
    found = []
    for node in alive:
        address = node["NodeManagerAddress"]
        name = "this machine" if address == here else address
        if shared[address] > 1:
            name += f" ({node['NodeID'][:6]})"
        found.append(Node(name, left.get(node["NodeID"], {}) if free else node["Resources"]))
    return found


def _nodes_of_group(group: PlacementGroup) -> list[Node]:
    """What a group holds on each node, less what this process takes of it."""
    table = placement_group_table(group)
    held: dict[str, Counter[str]] = {}
    for number, bundle in table["bundles"].items():
        held.setdefault(table["bundles_to_node_id"][number], Counter()).update(bundle)
    context = ray.get_runtime_context()
    held[context.get_node_id()].subtract(context.get_assigned_resources())
    return [Node(f"{node_id[:6]} (placement group)", has) for node_id, has in sorted(held.items())]
