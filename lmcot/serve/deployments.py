"""The two models as Ray Serve deployments: each replica is a process of its own."""

from __future__ import annotations

from lmcot.answering import frozen_lm, small_lm
from lmcot.config import Config
from lmcot.process import use_threads


class SmallLM(small_lm.SmallLM):
    """The small LM of a replica."""

    def __init__(self, config: Config, source: str, version: str, threads: int) -> None:
        """Prepares the process, and loads the model."""
        use_threads(threads)
        super().__init__(config, source, version)

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica whose engine has ended."""
        self.check_alive()


class FrozenLM(frozen_lm.FrozenLM):
    """The frozen LM of a replica."""

    def __init__(self, config: Config, threads: int) -> None:
        """Prepares the process, and loads the model or opens the endpoint's client."""
        use_threads(threads)
        super().__init__(config)

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica whose engine has ended."""
        self.check_alive()
