"""The learners: ranks of one DeepSpeed group, that live and die together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

import ray

from lmcot.actors.base import RemoteError
from lmcot.actors.learner_actor import LearnerActor
from lmcot.actors.resources.placement import Placement
from lmcot.config import Config
from lmcot.errors import first_line
from lmcot.learner.plan import LearnerPlan

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Limit = Literal["start_timeout_s", "unit_timeout_s"]
"""The setting below ``actors`` that limits a call."""
_GRACE_S = 30.0
"""Seconds that the other ranks have once one rank's call failed: they may be waiting for it."""
_PROBE_EVERY_S = 2.0


class LearnerLost(RuntimeError):
    """A learner died or hung: the group is gone, and can be started again."""


class PendingCall(Generic[_Result]):
    """A call that was made on all ranks; ``_Result`` is what one rank returns."""

    def __init__(self, group: LearnerGroup, method: str, refs: list[Any], limit: _Limit) -> None:
        self._group = group
        self._method = method
        self._refs = refs
        self._limit = limit
        self._limit_s: float = getattr(group.settings, limit)
        self._deadline = time.monotonic() + self._limit_s
        self._left = list(refs)
        self._results: dict[int, Any] = {}
        self._failed: RemoteError | None = None

    def refs(self) -> list[Any]:
        """Object references of the ranks that have not answered."""
        return list(self._left)

    def done(self) -> bool:
        """Whether all ranks have answered. Never waits; raises as `result` does."""
        self._look(wait=False)
        return not self._left

    def result(self) -> list[_Result]:
        """Waits for all ranks and returns their results by rank.

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
        """Collects the answers that have arrived; with ``wait``, waits for at least one."""
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
        error = TimeoutError if self._limit == "start_timeout_s" else LearnerLost
        raise error(
            f"waited {self._limit_s:.0f} s for '{self._method}' on {len(self._left)} of "
            f"{len(self._refs)} learner(s), and ended them: raise actors.{self._limit} if they "
            "need longer"
        )


class LearnerGroup:
    """Learner actors, placed together. Use as a context manager.

    A call goes to all ranks at once, because they compute together. It names a method of
    `LearnerActor` by the function itself, so that the type checker sees its arguments and result.
    When a rank dies the others would wait for it, so they are ended too and `LearnerLost` is
    raised; `start` starts the group again, and the caller restores the last checkpoint.
    """

    def __init__(self, config: Config, plan: LearnerPlan) -> None:
        self._config = config
        self._plan = plan
        self.host: Placement | None = None
        """Of the actors that the learners have room beside; None: they get room of their own."""
        self.settings = config.actors
        self.handles: list[Any] = []
        self._placement: Placement | None = None
        self._setup: PendingCall[None] | None = None
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
        role, limit = self.settings.learner, self.settings.start_timeout_s
        host = self.host
        self._placement = host.for_guest("learner", role) if host else Placement("learner", role)
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
            pending: PendingCall[tuple[str, int]]
            pending = PendingCall(self, "meeting", [ref], "start_timeout_s")
            meeting = pending.result()[0]
        self._setup = self.begin(LearnerActor.setup, meeting)

    def wait_ready(self) -> None:
        """Waits until each rank has set itself up.

        Raises:
            UserError: if one cannot start for a reason that the user can fix.
            TimeoutError: after ``actors.start_timeout_s``.
        """
        if self._setup is not None:
            self._setup.result()
            self._setup = None

    def stop(self) -> None:
        """Ends all ranks, including those that hang in a collective."""
        for handle in self.handles:
            ray.kill(handle)
        self.handles, self._probes = [], []
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

    def call(
        self,
        method: Callable[Concatenate[LearnerActor, _Arguments], _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> list[_Result]:
        """Calls a method on every rank and waits; results by rank.

        Raises:
            UserError, RuntimeError: what a rank refused or failed at.
            LearnerLost: if a rank died, or overran ``actors.unit_timeout_s``; the group is gone
                then.
        """
        return self.begin(method, *args, **kwargs).result()

    def begin(
        self,
        method: Callable[Concatenate[LearnerActor, _Arguments], _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> PendingCall[_Result]:
        """Makes a call without waiting for it; a rank does its calls in their order.

        Raises:
            LearnerLost: if the group was ended.
        """
        name = method.__name__
        if not self.handles:
            raise LearnerLost(f"there are no learners to call '{name}' on")
        # Large arguments travel once, not once a rank.
        shared = [ray.put(value) for value in args]
        named = {key: ray.put(value) for key, value in kwargs.items()}
        refs = [handle.apply.remote(method, *shared, **named) for handle in self.handles]
        starts = method is LearnerActor.setup
        return PendingCall(self, name, refs, "start_timeout_s" if starts else "unit_timeout_s")

    def refs(self) -> list[Any]:
        """Health probes in flight: what a wait for news of the learners waits for."""
        return list(self._probes)

    def check(self) -> None:
        """Probes from time to time whether the ranks are alive; never waits.

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
        """Probes all ranks, and waits ``limit_s`` for their answers; raises as `check` does."""
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
