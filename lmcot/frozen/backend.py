"""What a backend of the frozen LM is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

from lmcot.config import PromptSettings
from lmcot.frozen.needs import Found, Needs
from lmcot.records import Choice, Completion, Failure, Prompt, Sampling, Score, Usage


class FrozenBackend(ABC):
    """The `FrozenLM` protocol, opened from the backend's own settings.

    A backend is called from as many threads at once as its settings' ``calls_at_once`` says. What
    fails is returned as a `Failure` in its place; a call raises only for errors of the program.
    """

    @classmethod
    @abstractmethod
    def open(cls, settings: Any, prompts: PromptSettings) -> Self:
        """Loads the model or connects to it, so that it can be asked.

        Raises:
            UserError: if that fails for a reason that the user can fix.
        """

    @classmethod
    def check(cls, settings: Any, needs: Needs, spend: Callable[[Usage], None]) -> Found:
        """Checks before a run starts, without loading weights, that its requests can be answered.

        Args:
            spend: takes each request that the check sends into account; what it raises ends it.

        Raises:
            UserError: if they cannot.
        """
        return Found(settings)

    @property
    @abstractmethod
    def identity(self) -> str:
        """Names the model and its arithmetic, for reports and cache keys."""

    @property
    @abstractmethod
    def parameters(self) -> int | None:
        """Number of parameters, if known."""

    @property
    def notice(self) -> str:
        """What the user should know of how the model works; empty: nothing."""
        return ""

    def repeats(self, sampling: Sampling) -> bool:
        """Whether the same prompt gets the same completion again, so that it may be cached."""
        return sampling.temperature == 0 or sampling.seed is not None

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt."""

    @abstractmethod
    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options as the answer to each prompt, normalised over them."""

    @abstractmethod
    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation after its prompt.

        A backend that offers no log-likelihoods returns a permanent `Failure` for each.
        """

    def check_alive(self) -> None:
        """Checks that the model can be asked; an endpoint is not asked.

        Raises:
            RuntimeError: if it has ended.
        """
        return

    def close(self) -> None:
        """Ends the model's threads and connections; it is not asked again."""
        return
