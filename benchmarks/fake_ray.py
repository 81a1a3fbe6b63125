"""A fake Ray in one process, whose actors take time but do nothing.

It serialises what Ray would serialise, since that is the driver's work. The actors' work is not:
its time is counted in `FakeRay.spent` and not in the driver's. Actors have no threads, since the
time at which a call's result is ready is known when the call is made.
"""

from __future__ import annotations

import bisect
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import ray
from ray import cloudpickle
from ray.rllib.utils import actor_manager

from lmcot.actors import fleet, learner_group
from lmcot.actors.kept import Split
from lmcot.run import context
from lmcot.training import start


class StandIn:
    """Stand-in for an actor, whose methods say in ``took`` how long they take."""

    def __init__(self) -> None:
        self.took = 0.0
        self.free_at = 0.0

    def ping(self) -> str:
        """Health probe."""
        return "pong"

    def setup(self, *_: Any, **__: Any) -> str:
        """Returns at once, without notices."""
        return ""


class _Ref:
    """An object reference."""

    __slots__ = ("name", "payload", "ready_at")
    _names = itertools.count()

    def __init__(self, payload: bytes = b"", ready_at: float = 0.0) -> None:
        self.name = f"{next(self._names):056x}"
        self.payload = payload
        self.ready_at = ready_at

    def hex(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[type[_Ref], tuple[()]]:
        return _Ref, ()  # a reference is pickled without its object


class _Method:
    def __init__(self, ray: FakeRay, role: str, actor: StandIn, name: str | None) -> None:
        self._ray = ray
        self._role = role
        self._actor = actor
        self._name = name

    def remote(self, *args: Any, **kwargs: Any) -> _Ref:
        self._ray.passed += len(cloudpickle.dumps((args, kwargs)))
        return _Ref(*self._called(args, kwargs))

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, float]:
        """The pickled result of a call, and the time at which it is there."""
        started = time.process_time()
        actor = self._actor
        function, args = (getattr(actor, self._name), args) if self._name else self._applied(*args)
        actor.took = 0.0
        args = tuple(map(self._resolved, args))
        kwargs = {name: self._resolved(value) for name, value in kwargs.items()}
        payload = cloudpickle.dumps(function(*args, **kwargs))
        actor.free_at = max(actor.free_at, time.monotonic()) + actor.took
        self._ray.spent += time.process_time() - started
        return payload, actor.free_at

    def _resolved(self, value: Any) -> Any:
        """An argument as the actor gets it, with a reference replaced by its object."""
        return cloudpickle.loads(value.payload) if isinstance(value, _Ref) else value

    def _applied(self, func: str | Callable[..., Any], *args: Any) -> Any:
        """The method that ``apply`` calls, from its name or from the replaced class."""
        if isinstance(func, str):
            return getattr(self._actor, func), args
        if func.__qualname__.startswith(f"{self._role}."):
            return getattr(self._actor, func.__name__), args
        return func, (self._actor, *args)


class _Apply(_Method):
    """The method ``apply``; RLlib's manager passes the function by name, our calls do not."""

    def remote(self, *args: Any, **kwargs: Any) -> _Ref:
        if "func" in kwargs:
            args = (kwargs.pop("func"), *args)
        return super().remote(*args, **kwargs)


class _Split(_Method):
    """The method ``apply_split``, whose result's parts are an object each."""

    def options(self, *, num_returns: int) -> _Split:
        return self

    def remote(self, kept: int, *args: Any, **kwargs: Any) -> Any:
        self._ray.passed += len(cloudpickle.dumps((kept, args, kwargs)))
        payload, ready_at = self._called(args, kwargs)
        started = time.process_time()
        split: Split[Any] = cloudpickle.loads(payload)
        parts = [cloudpickle.dumps(part) for part in (split.told, *split.kept)]
        self._ray.spent += time.process_time() - started
        return [_Ref(part, ready_at) for part in parts]


class _Handle:
    def __init__(self, ray: FakeRay, role: str, actor: StandIn) -> None:
        self.apply = _Apply(ray, role, actor, None)
        self.apply_split = _Split(ray, role, actor, None)
        self.ping = _Method(ray, role, actor, "ping")


class _Class:
    def __init__(self, ray: FakeRay, role: str) -> None:
        self._ray = ray
        self._role = role

    def options(self, **_: Any) -> _Class:
        return self

    def remote(self, *_: Any, **__: Any) -> _Handle:
        return _Handle(self._ray, self._role, self._ray.stand_ins[self._role]())


class FakeRay:
    """The part of the module `ray` that the driver uses."""

    exceptions = ray.exceptions

    def __init__(self, stand_ins: Mapping[str, type[StandIn]]) -> None:
        """Args: stand_ins: stand-ins by the name of the actor class."""
        self.stand_ins = stand_ins
        self.spent = 0.0
        """CPU seconds spent on the actors' results."""
        self.passed = 0
        """Bytes that the driver sent and received."""

    def remote(self, actor_class: type) -> Any:
        """Wraps a class so that its actors are stand-ins."""
        return _Class(self, actor_class.__name__)

    def put(self, value: Any) -> Any:
        """Stores a copy and returns its reference."""
        payload = cloudpickle.dumps(value)
        self.passed += len(payload)
        return _Ref(payload)

    def get(self, refs: Any) -> Any:
        """Returns a copy of an object, or of each of a list."""
        if isinstance(refs, list):
            return [self.get(ref) for ref in refs]
        self.passed += len(refs.payload)
        return cloudpickle.loads(refs.payload)

    def kill(self, *_: Any, **__: Any) -> None:
        """Does nothing."""

    def wait(
        self,
        refs: Sequence[Any],
        *,
        num_returns: int = 1,
        timeout: float | None = None,
        fetch_local: bool = True,
    ) -> tuple[list[Any], list[Any]]:
        """Sleeps until enough references are ready or the time is up."""
        times = sorted(ref.ready_at for ref in refs)
        until = times[num_returns - 1]
        if timeout is not None:
            until = min(until, time.monotonic() + timeout)
        time.sleep(max(0.0, until - time.monotonic()))
        there = min(num_returns, bisect.bisect_right(times, time.monotonic()))
        ready = sorted(refs, key=lambda ref: ref.ready_at)[:there] if there else []
        chosen = set(map(id, ready))
        return ready, [ref for ref in refs if id(ref) not in chosen]


@contextmanager
def faked(stand_ins: Mapping[str, type[StandIn]]) -> Iterator[FakeRay]:
    """Puts a fake Ray below the fleets and the learners; the code above is unchanged."""
    fake = FakeRay(stand_ins)
    with ExitStack() as stack:
        for module in (actor_manager, *_modules_with_ray()):
            stack.enter_context(mock.patch.object(module, "ray", fake))
        for module in (fleet, learner_group):
            stack.enter_context(mock.patch.object(module, "Placement", mock.MagicMock()))
        stack.enter_context(mock.patch.object(context, "ray_cluster", mock.MagicMock()))
        stack.enter_context(mock.patch.object(start, "check_plan"))
        yield fake


def _modules_with_ray() -> list[ModuleType]:
    """Those of `lmcot.actors`, whichever they are."""
    return [
        module
        for name, module in sys.modules.items()
        if name.rpartition(".")[0] == "lmcot.actors" and getattr(module, "ray", None) is ray
    ]
