"""The Ray cluster: joined or started, checked for room, and left as it was found."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from lmcot.config import ActorsSettings, RoleSettings
from lmcot.errors import UserError


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


def check_room(fleets: Mapping[str, RoleSettings]) -> None:
    """Compares what the fleets of a stage take together with what the cluster has.

    Raises:
        UserError: naming what is short, before an actor waits for it for ever.
    """
    have = ray.cluster_resources()
    for resource, key in (("CPU", "cpus"), ("GPU", "gpus")):
        need = math.fsum(role.count * getattr(role, key) for role in fleets.values())
        if need > have.get(resource, 0.0) + 1e-9:
            parts = ", ".join(
                f"actors.{name} {role.count} x {getattr(role, key):g}"
                for name, role in fleets.items()
                if getattr(role, key)
            )
            raise UserError(
                f"the cluster has {have.get(resource, 0.0):g} {resource}, but the actors of this "
                f"stage take {need:g} ({parts}): lower 'count' or '{key}' there, or add nodes"
            )
