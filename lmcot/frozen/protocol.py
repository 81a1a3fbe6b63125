"""The frozen LM as everything else sees it: three calls, results or typed failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lmcot.records import Choice, Completion, Failure, Prompt, Sampling, Score


class FrozenLM(Protocol):
    """A language model that is asked and never trained.

    Every call takes a batch and returns one result per prompt, in order. What fails is returned
    as a `Failure` in its place; a call raises only for errors of the program.
    """

    @property
    def identity(self) -> str:
        """Names the model and its arithmetic, for reports and cache keys."""
        ...

    @property
    def parameters(self) -> int | None:
        """Number of parameters, if known."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt."""
        ...

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options as the answer to each prompt, normalised over them."""
        ...

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation after its prompt.

        A backend that offers no log-likelihoods returns a permanent `Failure` for each.
        """
        ...
