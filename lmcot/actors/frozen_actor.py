"""The frozen LM in actors of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmcot.actors.base import ActorBase
from lmcot.config import FrozenSettings, PromptSettings
from lmcot.frozen.cached import CachedLM, Method, Replies
from lmcot.frozen.open import open_frozen_lm
from lmcot.process import use_threads
from lmcot.records import Prompt


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
        """Loads the model, unless it is loaded; returns what the user should know of it."""
        return self._lm().notice

    def describe(self) -> Any:
        """Identity and number of parameters of the model; what it raises as a `RemoteError`."""
        return self.apply(FrozenActor._description)

    def ask(self, method: Method, prompts: Sequence[Prompt], argument: Any) -> Any:
        """One call of the `FrozenLM` protocol, as `Replies`; what it raises as a `RemoteError`.

        An actor that Ray restarted loads its model first.
        """
        return self.apply(FrozenActor._timed, method, prompts, argument)

    def _description(self) -> tuple[str, int | None]:
        return self._lm().identity, self._lm().parameters

    def _timed(self, method: Method, prompts: Sequence[Prompt], argument: Any) -> Replies:
        started = time.monotonic()
        replies = self._lm().replies(method, prompts, argument)
        return replace(replies, seconds=time.monotonic() - started)

    def _lm(self) -> CachedLM:
        with self._opening:  # several clients may call at once
            if self._opened is None:
                self._opened = open_frozen_lm(self._settings, self._prompts)
            return self._opened
