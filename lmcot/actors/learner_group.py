"""The learners: ranks of one DeepSpeed group, that live and die together."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lmcot.actors.base import RemoteError
from lmcot.actors.learner_actor import LearnerActor, LearnerPlan
from lmcot.config import Config

_STARTING = ("meeting", "setup")
"""Calls that have ``actors.start_timeout_s``."""
_GRACE_S = 30.0
"""How long the others may take once one rank's call has failed: they may be waiting for it."""


class LearnerLost(RuntimeError):
    """A learner died or hung: the group is gone, and can be started again."""


class PendingCall:
    """A call that was made on all ranks and not waited for yet."""

    def __init__(self, group: LearnerGroup, method: str, refs: list[Any], limit_s: float) -> None:
        self._group = group
        self._method = method
        self._refs = refs
        self._limit_s = limit_s

    def result(self) -> list[Any]:
        """Waits; results by rank. Raises as `LearnerGroup.call` does."""
        return self._group.wait(self._method, self._refs, self._limit_s)


class LearnerGroup:
    """Learner actors in one placement group. Use as a context manager.

    A call goes to all ranks at once, for they compute together. When one of them dies the
    others would wait for it, so they are ended too, and `LearnerLost` is raised; `start` makes
    the group anew, and the caller restores the last checkpoint.
    """

    def __init__(self, config: Config, plan: LearnerPlan) -> None:
        self._config = config
        self._plan = plan
        self._settings = config.actors
        self.handles: list[Any] = []
        self._placement: PlacementGroup | None = None
        self._setup: PendingCall | None = None

    def __enter__(self) -> LearnerGroup:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the actors, which meet and load their models; `wait_ready` waits for them.

        Raises:
            TimeoutError: if the cluster has no room for them, or rank 0 does not start.
        """
        self.stop()
        try:
            self._start()
        except BaseException:
            self.stop()  # what waits for room would take it once there is some
            raise

    def _start(self) -> None:
        role, limit = self._settings.learner, self._settings.start_timeout_s
        bundles = [{"CPU": role.cpus, "GPU": role.gpus} for _ in range(role.count)]
        wanted = [{name: amount for name, amount in b.items() if amount} for b in bundles]
        # A caller in a group (a trial of a sweep) has room for the ranks in its own.
        if get_current_placement_group() is None:
            self._placement = placement_group(
                [bundle or {"CPU": 0.001} for bundle in wanted], strategy=role.placement
            )
        if self._placement is not None and not self._placement.wait(limit):
            raise TimeoutError(
                f"waited {limit:.0f} s for the placement of {role.count} learner(s) with "
                f"{role.cpus:g} CPUs and {role.gpus:g} GPUs each (strategy {role.placement}): "
                "check that the nodes have them free, or change actors.learner"
            )
        self.handles = [
            ray.remote(LearnerActor)
            .options(
                num_cpus=role.cpus,
                num_gpus=role.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=rank
                )
                if self._placement is not None
                else None,
            )
            .remote(self._config, self._plan, rank)
            for rank in range(role.count)
        ]
        meeting = None
        if role.count > 1:
            ref = self.handles[0].apply.remote(LearnerActor.meeting)
            meeting = self.wait("meeting", [ref], limit)[0]
        self._setup = self.begin("setup", timeout_s=limit, meeting=meeting)

    def wait_ready(self) -> None:
        """Waits until each rank has set itself up.

        Raises:
            UserError: if one cannot start for a reason that is the user's to mend.
            TimeoutError: after ``actors.start_timeout_s``.
        """
        if self._setup is not None:
            self._setup.result()
            self._setup = None

    def stop(self) -> None:
        """Ends all ranks, those that hang in a collective too."""
        for handle in self.handles:
            ray.kill(handle)
        self.handles = []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    def call(self, method: str, *, timeout_s: float | None = None, **kwargs: Any) -> list[Any]:
        """Calls a method on every rank; results by rank.

        Raises:
            UserError, RuntimeError: what a rank refused or failed at.
            LearnerLost: if a rank died; the group is gone then.
            TimeoutError: after ``actors.unit_timeout_s``; the group is gone then.
        """
        return self.begin(method, timeout_s=timeout_s, **kwargs).result()

    def begin(self, method: str, *, timeout_s: float | None = None, **kwargs: Any) -> PendingCall:
        """Makes a call without waiting for it; a rank does its calls in their order.

        Raises:
            LearnerLost: if the group was ended.
        """
        if not self.handles:
            raise LearnerLost(f"there are no learners to call '{method}' on")
        function = getattr(LearnerActor, method)
        # Large arguments travel once, not once a rank.
        shared = {name: ray.put(value) for name, value in kwargs.items()}
        refs = [handle.apply.remote(function, **shared) for handle in self.handles]
        return PendingCall(self, method, refs, timeout_s or self._settings.unit_timeout_s)

    def wait(self, method: str, refs: list[Any], limit_s: float) -> list[Any]:
        """Waits for a call on all ranks; used by `PendingCall`."""
        deadline = time.monotonic() + limit_s
        results: dict[int, Any] = {}
        failed: RemoteError | None = None
        left = list(refs)
        while left:
            ready, left = ray.wait(left, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                self.stop()
                if failed is not None:
                    raise failed.to_exception("learner")
                setting = "start_timeout_s" if method in _STARTING else "unit_timeout_s"
                raise TimeoutError(
                    f"waited {limit_s:.0f} s for '{method}' on {len(left)} of {len(refs)} "
                    f"learner(s), and ended them: raise actors.{setting} if they need longer"
                )
            try:
                value = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                self.stop()
                raise LearnerLost(
                    f"learner {refs.index(ready[0])} was lost during '{method}': "
                    f"{str(error).splitlines()[0]}"
                ) from None
            if isinstance(value, RemoteError) and failed is None:
                failed = value
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            results[refs.index(ready[0])] = value
        if failed is not None:
            raise failed.to_exception("learner")
        return [results[number] for number in range(len(refs))]
