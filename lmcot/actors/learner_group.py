"""The learners: ranks of one DeepSpeed group, that live and die together."""

from __future__ import annotations

import time
from typing import Any

import ray

from lmcot.actors.base import RemoteError
from lmcot.actors.learner_actor import LearnerActor, LearnerPlan
from lmcot.actors.resources.placement import Placement
from lmcot.config import Config
from lmcot.errors import first_line

_STARTING = ("meeting", "setup")
"""Calls that have ``actors.start_timeout_s``."""
_GRACE_S = 30.0
"""How long the others may take once one rank's call has failed: they may be waiting for it."""
_PROBE_EVERY_S = 2.0


class LearnerLost(RuntimeError):
    """A learner died or hung: the group is gone, and can be started again."""


class PendingCall:
    """A call that was made on all ranks."""

    def __init__(self, group: LearnerGroup, method: str, refs: list[Any], limit_s: float) -> None:
        self._group = group
        self._method = method
        self._refs = refs
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._left = list(refs)
        self._results: dict[int, Any] = {}
        self._failed: RemoteError | None = None

    def refs(self) -> list[Any]:
        """Of the ranks that have not answered."""
        return list(self._left)

    def done(self) -> bool:
        """Whether all ranks have answered. Never waits; raises as `result` does."""
        self._look(wait=False)
        return not self._left

    def result(self) -> list[Any]:
        """Waits; results by rank.

        Raises:
            UserError, RuntimeError: what a rank refused or failed at.
            LearnerLost: if a rank died or overran its time limit; the group is gone then.
            TimeoutError: if the group did not start in its time; it is gone then.
        """
        while self._left:
            self._look(wait=True)
        if self._failed is not None:
            raise self._failed.to_exception("learner")
        return [self._results[number] for number in range(len(self._refs))]

    def _look(self, *, wait: bool) -> None:
        """Takes note of the ranks that have answered; waits for one if told to."""
        if not self._left:
            return
        seconds = max(self._deadline - time.monotonic(), 0.0)
        ready, self._left = ray.wait(
            self._left, num_returns=1 if wait else len(self._left), timeout=seconds if wait else 0
        )
        for ref in ready:
            self._note(ref)
        if not ready and self._left and seconds == 0:
            self._overdue()

    def _note(self, ref: Any) -> None:
        number = self._refs.index(ref)
        try:
            value = ray.get(ref)
        except ray.exceptions.RayError as error:
            self._group.stop()
            raise LearnerLost(
                f"learner {number} was lost during '{self._method}': {first_line(error)}"
            ) from None
        if isinstance(value, RemoteError) and self._failed is None:
            self._failed = value
            self._deadline = min(self._deadline, time.monotonic() + _GRACE_S)
        self._results[number] = value

    def _overdue(self) -> None:
        self._group.stop()
        if self._failed is not None:
            raise self._failed.to_exception("learner")
        starting = self._method in _STARTING
        setting = "start_timeout_s" if starting else "unit_timeout_s"
        raise (TimeoutError if starting else LearnerLost)(
            f"waited {self._limit_s:.0f} s for '{self._method}' on {len(self._left)} of "
            f"{len(self._refs)} learner(s), and ended them: raise actors.{setting} if they need "
            "longer"
        )


class LearnerGroup:
    """Learner actors, placed together. Use as a context manager.

    A call goes to all ranks at once, for they compute together. When one of them dies the
    others would wait for it, so they are ended too, and `LearnerLost` is raised; `start` makes
    the group anew, and the caller restores the last checkpoint.
    """

    def __init__(self, config: Config, plan: LearnerPlan) -> None:
        self._config = config
        self._plan = plan
        self._settings = config.actors
        self.handles: list[Any] = []
        self._placement: Placement | None = None
        self._setup: PendingCall | None = None
        self._probes: list[Any] = []
        self._probed = time.monotonic()

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
        self._placement = Placement("learner", role)
        self._placement.wait(limit)
        self.handles = [
            ray.remote(LearnerActor)
            .options(**self._placement.options(rank))
            .remote(self._config, self._plan, rank)
            for rank in range(role.count)
        ]
        meeting = None
        if role.count > 1:
            ref = self.handles[0].apply.remote(LearnerActor.meeting)
            meeting = PendingCall(self, "meeting", [ref], limit).result()[0]
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
        self.handles, self._probes = [], []
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

    def call(self, method: str, *, timeout_s: float | None = None, **kwargs: Any) -> list[Any]:
        """Calls a method on every rank; results by rank.

        Raises:
            UserError, RuntimeError: what a rank refused or failed at.
            LearnerLost: if a rank died, or overran ``actors.unit_timeout_s``; the group is gone
                then.
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

    def refs(self) -> list[Any]:
        """Health probes underway: what a wait for news of the learners waits for."""
        return list(self._probes)

    def check(self) -> None:
        """Asks the ranks now and then whether they are alive. Never waits.

        Raises:
            LearnerLost: if one is not; the group is gone then.
        """
        if not self._probes and time.monotonic() - self._probed > _PROBE_EVERY_S:
            self.probe(0.0)
        if not self._probes:
            return
        ready, self._probes = ray.wait(self._probes, num_returns=len(self._probes), timeout=0)
        self._read_probes(ready)

    def probe(self, limit_s: float) -> None:
        """Asks all ranks whether they are alive, and waits so long; raises as `check` does."""
        self._probes = [handle.ping.remote() for handle in self.handles]
        self._probed = time.monotonic()
        if limit_s and self._probes:
            ready, self._probes = ray.wait(
                self._probes, num_returns=len(self._probes), timeout=limit_s
            )
            self._read_probes(ready)

    def _read_probes(self, ready: list[Any]) -> None:
        for ref in ready:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                self.stop()
                raise LearnerLost(f"a learner was lost: {first_line(error)}") from None
