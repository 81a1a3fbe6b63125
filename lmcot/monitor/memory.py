"""Measures a run's memory on the driver's node, now and then."""

from __future__ import annotations

import os
import time

import psutil

_EVERY_S = 10.0
"""Seconds between measurements: reading all processes of a node, and asking Ray, takes
milliseconds."""
_ROLES = {
    "ray::RolloutActor": "rollout",
    "ray::RewardActor": "reward",
    "ray::FrozenActor": "frozen",
    "ray::LearnerActor": "learner",
}
"""Names that Ray gives the actors' processes."""
_MIB = 2**20


class MemoryMeter:
    """Measures at most every ten seconds, and returns the last measurement until then."""

    def __init__(self) -> None:
        self._driver = psutil.Process()
        self._measured = -_EVERY_S
        self._found: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Returns, in MiB, ``memory/driver``, ``memory/ROLE`` and ``memory/object_store``; and the
        used share of the node's memory, ``memory/node_share``.

        Shared memory, above all the object store, is not counted as a process's. A role's memory is
        that of all its actors on this node, of other runs too; the store is the whole cluster's.
        """
        now = time.monotonic()
        if now - self._measured >= _EVERY_S:
            self._measured = now
            self._found = {
                "memory/driver": _own(self._driver),
                "memory/node_share": psutil.virtual_memory().percent / 100,
                **_roles(),
                **_object_store(),
            }
        return self._found


def _own(process: psutil.Process) -> float:
    info = process.memory_info()
    return (info.rss - getattr(info, "shared", 0)) / _MIB


def _roles() -> dict[str, float]:
    found: dict[str, float] = {}
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid():
                continue
            name = " ".join(process.cmdline()[:1])
            role = _ROLES.get(name.partition(".")[0])
            if role is not None:
                key = f"memory/{role}"
                found[key] = found.get(key, 0.0) + _own(process)
        except psutil.Error:  # it ended meanwhile, or is another user's
            continue
    return found


def _object_store() -> dict[str, float]:
    import ray

    if not ray.is_initialized():
        return {}
    has, free = (
        each.get("object_store_memory", 0.0)
        for each in (ray.cluster_resources(), ray.available_resources())
    )
    return {"memory/object_store": max(0.0, has - free) / _MIB}
