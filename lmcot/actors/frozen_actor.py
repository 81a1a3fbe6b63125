"""The frozen LM in actors of its own, and the client that others reach it with."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from lmcot.actors.base import ActorBase, RemoteError, Unanswered
from lmcot.actors.units import PromptUnit
from lmcot.config import FrozenSettings, PromptSettings
from lmcot.frozen.cached import CachedLM, Method, Replies
from lmcot.frozen.open import open_frozen_lm
from lmcot.process import use_threads
from lmcot.records import Choice, Completion, Failure, Prompt, Sampling, Score, Usage

_RETRY_PAUSE_S = 1.0


class FrozenActor(ActorBase):
    """Holds one frozen LM, or one client of an endpoint."""

    def __init__(
        self,
        settings: FrozenSettings,
        prompts: PromptSettings,
        threads: int,
    ) -> None:
        use_threads(threads)
        self._settings = settings
        self._prompts = prompts
        self._opened: CachedLM | None = None
        self._opening = threading.Lock()

    def setup(self) -> str:
        """Loads the model, if it is not there yet; returns what its user should know of it."""
        return self._lm().notice

    def describe(self) -> tuple[str, int | None]:
        """Identity and number of parameters of the model."""
        return self._lm().identity, self._lm().parameters

    def complete(self, unit: PromptUnit) -> Replies:
        """A unit of completions, for stages that ask the fleet directly."""
        return self._lm().replies("generate", unit.prompts, unit.sampling)

    def ask(self, method: Method, prompts: Sequence[Prompt], argument: Any) -> Any:
        """One call of the `FrozenLM` protocol, as `Replies`; what it raises as a `RemoteError`.

        An actor that Ray started anew loads its model first.
        """
        return self.apply(FrozenActor._timed, method, prompts, argument)

    def _timed(self, method: Method, prompts: Sequence[Prompt], argument: Any) -> Replies:
        started = time.monotonic()
        replies = self._lm().replies(method, prompts, argument)
        return replace(replies, seconds=time.monotonic() - started)

    def _lm(self) -> CachedLM:
        with self._opening:  # several clients may call at once
            if self._opened is None:
                self._opened = open_frozen_lm(self._settings, self._prompts)
            return self._opened


class RemoteFrozenLM:
    """The `FrozenLM` protocol over a fleet of `FrozenActor`s.

    Each call goes whole to one actor, so that a local model batches within one work unit; the
    next actor is asked if one is lost. One that takes longer than the time limit is ended, for it
    may hang.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        *,
        identity: str,
        parameters: int | None,
        timeout_s: float,
        first: int = 0,
    ) -> None:
        self._handles = list(handles)
        self._identity = identity
        self._parameters = parameters
        self._timeout_s = timeout_s
        self._next = first
        self._deadline: float | None = None
        self.usage = Usage()
        """What was asked so far, or since the unit began."""
        self.seconds = 0.0
        """That the actors worked on it, likewise."""

    def begin_unit(self) -> None:
        """From now on, usage is counted anew and all calls together have the time limit."""
        self.usage, self.seconds = Usage(), 0.0
        self._deadline = time.monotonic() + self._timeout_s

    @property
    def identity(self) -> str:
        """Names the model and its arithmetic."""
        return self._identity

    @property
    def parameters(self) -> int | None:
        """Number of parameters, if known."""
        return self._parameters

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt."""
        return self._call("generate", prompts, sampling)

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options for each prompt."""
        return self._call("choose", prompts, list(options))

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation."""
        return self._call("score", prompts, list(continuations))

    def _call(self, method: Method, prompts: Sequence[Prompt], argument: Any) -> list[Any]:
        deadline = self._deadline or time.monotonic() + self._timeout_s
        while True:
            handle = self._handles[self._next % len(self._handles)]
            self._next += 1
            try:
                left = max(deadline - time.monotonic(), 0.0)
                result = ray.get(handle.ask.remote(method, list(prompts), argument), timeout=left)
            except GetTimeoutError:
                # Only its end frees an actor that hangs; Ray starts it anew.
                ray.kill(handle, no_restart=False)
                raise Unanswered(
                    f"the frozen LM did not get through a work unit in {self._timeout_s:.0f} s "
                    f"(at '{method}'): raise actors.unit_timeout_s or lower actors.prompts_per_unit"
                ) from None
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_PAUSE_S)
                continue
            if isinstance(result, RemoteError):
                raise result.to_exception("frozen-LM actor")
            replies: Replies = result
            self.usage += replies.usage
            self.seconds += replies.seconds
            return replies.results
