"""The frozen LM in actors of its own, and the client that others reach it with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from lmcot.actors.base import ActorBase, RemoteError, prepare_process
from lmcot.actors.units import PromptUnit, Replies
from lmcot.config import OpenAIFrozen, PromptSettings, TransformersFrozen
from lmcot.frozen.cached import CachedLM
from lmcot.frozen.open import open_frozen_lm
from lmcot.frozen.protocol import FrozenLM
from lmcot.records import Choice, Completion, Failure, Prompt, Sampling, Score

_RETRY_PAUSE_S = 1.0


class FrozenActor(ActorBase):
    """Holds one frozen LM, or one client of an endpoint."""

    def __init__(
        self,
        settings: TransformersFrozen | OpenAIFrozen,
        prompts: PromptSettings,
        threads: int,
    ) -> None:
        prepare_process(threads)
        self._settings = settings
        self._prompts = prompts
        self._opened: FrozenLM | None = None

    def setup(self) -> None:
        """Loads the model, if it is not there yet."""
        self._lm()

    def describe(self) -> tuple[str, int | None]:
        """Identity and number of parameters of the model."""
        return self._lm().identity, self._lm().parameters

    def complete(self, unit: PromptUnit) -> Replies:
        """A unit of completions, for stages that ask the fleet directly."""
        return self._counted("generate", unit.prompts, unit.sampling)

    def ask(self, method: str, *arguments: Any) -> Any:
        """One call of the `FrozenLM` protocol, as `Replies`; what it raises as a `RemoteError`.

        An actor that Ray started anew loads its model first.
        """
        return self.apply(lambda actor: actor._counted(method, *arguments))

    def _counted(self, method: str, *arguments: Any) -> Replies:
        lm = self._lm()
        cache = lm if isinstance(lm, CachedLM) else None
        if cache is not None:
            cache.counts()
        results = getattr(lm, method)(*arguments)
        return Replies(results, cached=cache.counts().found if cache is not None else 0)

    def _lm(self) -> FrozenLM:
        if self._opened is None:
            self._opened = open_frozen_lm(self._settings, self._prompts)
        return self._opened


class RemoteFrozenLM:
    """The `FrozenLM` protocol over a fleet of `FrozenActor`s.

    Each call goes whole to one actor, so that a local model batches within one work unit; the
    next actor is asked if one is lost.
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
        self.asked = self.cached = 0
        """Requests so far, and how many of them the cache answered."""

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
        results: list[Completion | Failure] = self._call("generate", list(prompts), sampling)
        return results

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options for each prompt."""
        results: list[Choice | Failure] = self._call("choose", list(prompts), list(options))
        return results

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation."""
        results: list[Score | Failure] = self._call("score", list(prompts), list(continuations))
        return results

    def _call(self, method: str, *arguments: Any) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while True:
            handle = self._handles[self._next % len(self._handles)]
            self._next += 1
            try:
                left = max(deadline - time.monotonic(), 0.0)
                result = ray.get(handle.ask.remote(method, *arguments), timeout=left)
            except GetTimeoutError:
                raise TimeoutError(
                    f"waited {self._timeout_s:.0f} s for the frozen LM's '{method}': raise "
                    "actors.unit_timeout_s or lower actors.prompts_per_unit"
                ) from None
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_PAUSE_S)
                continue
            if isinstance(result, RemoteError):
                raise result.to_exception("frozen-LM actor")
            self.asked += len(result.results)
            self.cached += result.cached
            return result.results
