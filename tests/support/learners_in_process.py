"""The learners of a stage in the test's own process: one rank, no Ray, all else as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lmcot.actors.learner_actor import LearnerActor
from lmcot.config import Config
from lmcot.learner.plan import LearnerPlan
from lmcot.training import learners


class Killed(BaseException):
    """The whole process is gone: nothing is caught, and nothing more is written."""


class _Done:
    """A call that is done."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def refs(self) -> list[Any]:
        return []

    def done(self) -> bool:
        return True

    def result(self) -> list[Any]:
        return [self._result]


class GroupInProcess:
    """One rank that does what it is told at once."""

    killed_at: tuple[str, int] | None = None
    """Name of a method, and which call of it kills the process before it is made."""
    calls: list[str]

    def __init__(self, config: Config, plan: LearnerPlan) -> None:
        self._config, self._plan = config, plan
        self.handles: list[Any] = []

    def start(self) -> None:
        actor = LearnerActor.__new__(LearnerActor)  # its threads are the test's
        actor._config, actor._plan, actor._rank = self._config, self._plan, 0
        actor.setup(None)
        self.handles = [actor]

    def wait_ready(self) -> None:
        pass

    def stop(self) -> None:
        self.handles = []

    def refs(self) -> list[Any]:
        return []

    def check(self) -> None:
        pass

    def probe(self, limit_s: float) -> None:
        pass

    def begin(self, method: Callable[..., Any], *args: Any) -> _Done:
        name = method.__name__
        self.calls.append(name)
        if (name, self.calls.count(name)) == self.killed_at:
            raise Killed
        return _Done(method(self.handles[0], *args))

    def call(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        return self.begin(method, *args).result()


def learn_in_process(
    monkeypatch: pytest.MonkeyPatch, killed_at: tuple[str, int] | None = None
) -> list[str]:
    """From now on stages learn in this process.

    Returns:
        the names of the calls that are made of the learners.
    """
    calls: list[str] = []
    monkeypatch.setattr(GroupInProcess, "killed_at", killed_at)
    monkeypatch.setattr(GroupInProcess, "calls", calls, raising=False)
    monkeypatch.setattr(learners, "LearnerGroup", GroupInProcess)
    return calls
