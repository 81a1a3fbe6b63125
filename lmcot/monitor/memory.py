"""What a run holds in memory on the driver's node, looked at now and then."""

from __future__ import annotations

import os
import time

import psutil

_EVERY_S = 10.0
"""To look at all processes of a node, and to ask Ray, takes milliseconds."""
_ROLES = {
    "ray::RolloutActor": "rollout",
    "ray::RewardActor": "reward",
    "ray::FrozenActor": "frozen",
    "ray::LearnerActor": "learner",
}
"""How Ray names the actors' processes."""
_MIB = 2**20


class MemoryMeter:
    """Measures at most every ten seconds, and tells the last measurement until then."""

    def __init__(self) -> None:
        self._driver = psutil.Process()
        self._measured = -_EVERY_S
        self._found: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """In MiB: ``memory/driver``, ``memory/ROLE``, ``memory/object_store``; and the share of
        the node's memory that is taken, ``memory/node_share``.

        A process is counted without what it shares with others, the object store above all. Roles
        are all actors on this node, those of other runs too; the store is the whole cluster's.
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
        except psutil.Error:  # it ended meanwhile, or is none of ours
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
