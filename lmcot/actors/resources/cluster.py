"""Joins or starts the Ray cluster, checks it for room, and leaves it as it was found."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray._private.state import available_resources_per_node
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup

from lmcot.actors.resources.joining import check_cluster
from lmcot.actors.resources.packing import Node
from lmcot.actors.resources.placement import captured_in
from lmcot.actors.resources.plan import Plan, Published, Roles, make_plan
from lmcot.actors.resources.surroundings import (
    available_memory,
    object_store_bytes,
    prepare_machine,
    provide_token,
    ray_folder,
)
from lmcot.config import ActorsSettings
from lmcot.errors import UserError, first_line
from lmcot.monitor.progress import say
from lmcot.process import do_without_home

_SYSTEM = {"task_events_report_interval_ms": 0}
"""Ray's own settings for a cluster that is started here: no record of tasks. Ray's GCS would keep
that of the last 100,000 calls, 3 MiB for each thousand, for a dashboard that is not started."""
_NICENESS = "RAY_worker_niceness"
"""Ray's variable for the niceness that its workers are started at."""


@contextmanager
def ray_cluster(settings: ActorsSettings) -> Iterator[None]:
    """Joins the cluster of ``actors.address`` or RAY_ADDRESS, else starts one on this machine.

    A cluster that was started here is stopped at the end; an earlier Ray connection stays.

    Raises:
        UserError: if the cluster cannot be joined, or Ray does not start here.
    """
    if ray.is_initialized():
        yield
        return
    # Notices that need no action would bury the progress.
    for name in ("ray.rllib", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    address = joined_address(settings)
    try:
        if address is None:
            _start(settings)
        else:
            _join(address, settings)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # Ray raises many types here, plain Exception among them
        ray.shutdown()
        raise UserError(_complaint(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def joined_address(settings: ActorsSettings) -> str | None:
    """The address of the cluster that is joined; None where one is started on this machine."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    return None if not address or address == "local" else address


def _join(address: str, settings: ActorsSettings) -> None:
    do_without_home()
    with suppress(UserError):  # without a cache there is no cached token
        provide_token(make=False)
    check_cluster(address, settings.start_timeout_s)
    if "niceness" in settings.model_fields_set:
        say(
            f"actors.niceness is ignored: the Ray cluster at '{address}' was started by others, "
            f"with {_NICENESS} (15 unless set) in the environment of each node's 'ray start'"
        )
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)


def _start(settings: ActorsSettings) -> None:
    prepare_machine()
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=object_store_bytes(settings.object_store_gib),
        _temp_dir=ray_folder()[0],
        _system_config={**_SYSTEM, **_niceness(settings)},
    )


def _niceness(settings: ActorsSettings) -> dict[str, int]:
    """The niceness of Ray's workers as Ray's settings have it; the environment's is left to Ray."""
    return {} if _NICENESS in os.environ else {"worker_niceness": settings.niceness}


def _complaint(address: str | None, error: Exception) -> str:
    reason = f"{first_line(error)} ({type(error).__name__})"
    if address is not None:
        return f"the Ray cluster at '{address}' cannot be joined: {reason}"
    if "object store" in str(error):
        store = object_store_bytes(None) / 2**30
        return (
            f"{available_memory() / 2**30:.2f} GiB of memory are available on this machine, too "
            f"little for Ray beside its object store: free some, or lower actors.object_store_gib "
            f"(by default it would be {store:.2f}); Ray says: {reason}"
        )
    return (
        f"Ray does not start on this machine: {reason}; see its logs in "
        f"'{ray_folder()[0]}/session_latest/logs', and 'lmcot doctor'"
    )


def find_plan(stage: str, roles: Roles, published: Published | None = None) -> Plan:
    """The resource plan of a stage on the cluster as it is now.

    Inside a placement group that captures this process's actors (a trial of Ray Tune) only the
    group's resources count, and its bundles are already placed: strategies have no effect there.
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
    """Prints what a stage's actors take, so that none waits for room for ever.

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
    """The nodes that are alive, by address, and by id if several share an address.

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
    """A group's resources on each node, less those that this process takes."""
    table = placement_group_table(group)
    held: dict[str, Counter[str]] = {}
    for number, bundle in table["bundles"].items():
        held.setdefault(table["bundles_to_node_id"][number], Counter()).update(bundle)
    context = ray.get_runtime_context()
    held[context.get_node_id()].subtract(context.get_assigned_resources())
    return [Node(f"{node_id[:6]} (placement group)", has) for node_id, has in sorted(held.items())]
