"""The client of the frozen LM's actors, for the driver and for reward actors alike."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from lmcot.actors.base import RemoteError, Unanswered
from lmcot.actors.ledger import NEVER_BEGUN_S
from lmcot.actors.news import wait_for_news
from lmcot.actors.units import PromptUnit
from lmcot.errors import first_line
from lmcot.frozen.cached import Method, Replies
from lmcot.records import Choice, Completion, Failure, Prompt, Sampling, Score, Usage

_REST_S = 1.0
"""How long an actor that was lost gets no call: Ray is restarting it."""


@dataclass(slots=True, eq=False)
class _Call:
    """One call of an actor, however often it is sent."""

    key: str
    what: str
    send: Callable[[Any], Any]
    """Sends it to an actor's handle; returns the object reference of its result."""
    deadline: float = math.inf
    """End of the attempt that has begun."""
    attempts: int = 0
    """Attempts that failed."""
    actor: int = -1
    """The actor that has it, or had it last."""
    sent: float = 0.0
    overran: bool = False
    """Whether the last attempt ended at its deadline."""
    trouble: str = "every actor is being restarted"
    """Why the last attempt failed."""
    wanted: bool = True


class FrozenClient:
    """The `FrozenLM` protocol over the frozen LM's actors, and units of prompts in the background.

    A call goes whole to one actor, so that a local model batches within one call; each actor has
    at most one call of this client at a time. What goes wrong is dealt with in one way:

    - A call has ``limit_s`` seconds. An actor that takes longer may hang, so it is killed.
    - A call whose actor died or was killed is sent to another one, ``attempts`` times in all. Ray
      restarts the actor, which loads its model at the next call.
    - A call that found its actor dead costs no attempt; it has ``limit_s`` to find one that lives.
    - What has no reply after that raises `Unanswered`. A reply's own failures are in the reply.

    Not for several threads at once.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        *,
        limit_s: float,
        attempts: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares the client; nothing is called yet.

        Args:
            check: called while waiting; raises to abandon the wait.
        """
        self._handles = list(handles)
        self._limit_s = limit_s
        self._attempts = attempts
        self._check = check
        self._next = 0
        self._calls = 0
        self._waiting: deque[_Call] = deque()
        self._sent: dict[Any, _Call] = {}
        self._rests_until = [0.0] * len(self._handles)
        self._unit_ends = math.inf
        self._described: tuple[str, int | None] | None = None
        self.usage = Usage()
        """What was asked so far, or since the unit began."""
        self.seconds = 0.0
        """Seconds that the actors worked on it, likewise."""

    def begin_unit(self) -> None:
        """Starts a unit of work: its calls share the time limit, and its usage counts from 0."""
        self.usage, self.seconds = Usage(), 0.0
        self._unit_ends = time.monotonic() + self._limit_s

    @property
    def identity(self) -> str:
        """Names the model and its arithmetic; an actor is asked once."""
        return self._describe()[0]

    @property
    def parameters(self) -> int | None:
        """Number of parameters, if known; an actor is asked once."""
        return self._describe()[1]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt."""
        return self._replies("generate", prompts, sampling)

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options for each prompt."""
        return self._replies("choose", prompts, list(options))

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation."""
        return self._replies("score", prompts, list(continuations))

    def submit(self, key: str, unit: PromptUnit) -> None:
        """Takes a unit on, to be asked in the background. See `turn`."""
        prompts, options = list(unit.prompts), list(unit.options)
        method: Method = "choose" if options else "generate"
        argument = options or unit.sampling
        self._waiting.append(
            _Call(key, method, lambda handle: handle.ask.remote(method, prompts, argument))
        )

    def refs(self) -> list[Any]:
        """Object references that become ready when there is news."""
        return list(self._sent)

    def turn(self) -> list[tuple[str, Replies]]:
        """Replies to units that have arrived, by key; sends more units. Never waits.

        Raises:
            Unanswered: if a unit got no reply in the time and the attempts that there are.
            UserError, RuntimeError: what an actor refused, or failed at.
        """
        return self._turn()

    def abandon(self) -> None:
        """Forgets all units; results that still come are dropped."""
        self._waiting.clear()
        for call in self._sent.values():
            call.wanted = False

    def map(
        self,
        units: Sequence[PromptUnit],
        *,
        on_result: Callable[[int, Replies], None] = lambda index, replies: None,
    ) -> list[Replies]:
        """Has every unit answered; the replies in the order of the units.

        Args:
            on_result: told each unit's index and replies as they arrive.

        Raises: as `turn` does.
        """
        for index, unit in enumerate(units):
            self.submit(str(index), unit)
        results: dict[int, Replies] = {}

        def keep(key: str, replies: Replies) -> None:
            results[int(key)] = replies
            on_result(int(key), replies)

        self._work_off(keep)
        return [results[index] for index in range(len(units))]

    def _describe(self) -> tuple[str, int | None]:
        if self._described is None:
            self._described = self._ask("describe", lambda handle: handle.describe.remote())
        return self._described

    def _replies(self, method: Method, prompts: Sequence[Prompt], argument: Any) -> list[Any]:
        replies: Replies = self._ask(
            method, lambda handle: handle.ask.remote(method, list(prompts), argument)
        )
        return replies.results

    def _ask(self, what: str, send: Callable[[Any], Any]) -> Any:
        """Waits for the result of one call."""
        self._calls += 1
        self._waiting.append(_Call(f"{what}/{self._calls}", what, send))
        results: list[Any] = []
        self._work_off(lambda key, value: results.append(value))
        return results[0]

    def _work_off(self, keep: Callable[[str, Any], None]) -> None:
        """Waits for the results of all calls."""
        try:
            while self._open():
                self._check()
                for key, value in self._turn():
                    keep(key, value)
                if self._open():
                    wait_for_news(self)
        finally:
            self.abandon()

    def _open(self) -> bool:
        return bool(self._waiting) or any(call.wanted for call in self._sent.values())

    def _turn(self) -> list[tuple[str, Any]]:
        results = self._harvest()
        self._kill_overdue()
        self._send_waiting()
        return results

    def _harvest(self) -> list[tuple[str, Any]]:
        if not self._sent:
            return []
        ready, _ = ray.wait(list(self._sent), num_returns=len(self._sent), timeout=0)
        results = []
        for ref in ready:
            call = self._sent.pop(ref)
            try:
                value = ray.get(ref)
            except RayError as error:
                self._lose(call, first_line(error))
                continue
            if not call.wanted:
                continue
            if isinstance(value, RemoteError):
                raise value.to_exception("frozen-LM actor")
            if isinstance(value, Replies):
                self.usage += value.usage
                self.seconds += value.seconds
            results.append((call.key, value))
        return results

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for ref, call in list(self._sent.items()):
            if now > call.deadline:
                # Nothing else frees an actor that hangs; Ray restarts it.
                ray.kill(self._handles[call.actor], no_restart=False)
                del self._sent[ref]
                call.overran = True
                self._lose(call, f"it took longer than {self._limit_s:.0f} s")

    def _lose(self, call: _Call, reason: str) -> None:
        """An attempt failed with its actor: the call is sent again, before the others."""
        now = time.monotonic()
        self._rests_until[call.actor] = now + _REST_S
        if not call.wanted:
            return
        call.trouble = reason
        if now - call.sent >= NEVER_BEGUN_S or call.overran:
            call.attempts += 1
            call.deadline = math.inf
        if call.attempts >= self._attempts:
            raise self._given_up(call)
        self._waiting.appendleft(call)

    def _send_waiting(self) -> None:
        while self._waiting:
            call, now = self._waiting[0], time.monotonic()
            if now > min(call.deadline, self._unit_ends):
                raise self._given_up(self._waiting.popleft())
            actor = self._free_actor(now)
            if actor is None:
                return
            self._next = actor + 1
            if call.deadline == math.inf:
                call.deadline = min(now + self._limit_s, self._unit_ends)
            call.actor, call.sent, call.overran = actor, now, False
            self._sent[call.send(self._handles[actor])] = self._waiting.popleft()

    def _free_actor(self, now: float) -> int | None:
        """The next actor in turn that has no call of this client and is not being restarted."""
        number = len(self._handles)
        busy = {call.actor for call in self._sent.values()}
        order = ((self._next + step) % number for step in range(number))
        return next(
            (one for one in order if one not in busy and self._rests_until[one] <= now), None
        )

    def _given_up(self, call: _Call) -> Unanswered:
        if call.overran:
            return Unanswered(
                f"the frozen LM did not get through a work unit in {self._limit_s:.0f} s (at "
                f"'{call.what}'): raise actors.unit_timeout_s or lower actors.prompts_per_unit"
            )
        return Unanswered(
            f"no frozen-LM actor replied to '{call.what}' ({call.attempts} attempts in "
            f"{self._limit_s:.0f} s at most each; the last failed because {call.trouble}): see "
            "Ray's logs for why the actors die, or raise actors.unit_timeout_s"
        )
