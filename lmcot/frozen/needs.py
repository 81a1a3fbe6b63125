"""What a run will ask of its frozen LM, and what a first check of it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lmcot.config import FrozenSettings
from lmcot.records import Prompt, Sampling, Usage

Measure = Literal["choose", "score"]
"""A call of the `FrozenLM` protocol that not every endpoint supports."""


@dataclass(frozen=True, slots=True)
class Needs:
    """The forms of the requests that will be sent."""

    completions: tuple[tuple[Prompt, Sampling], ...]
    """One request of each form: the same lengths, temperatures, seeds and stop strings."""
    choices: tuple[Prompt, ...] = ()
    """Some of the judge's questions; empty where nothing is judged."""
    scores: bool = False
    """Whether log-likelihoods of given texts are asked for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a first check found."""

    settings: FrozenSettings
    """The settings with what was learned of the endpoint; everything that asks it must use them."""
    notices: tuple[str, ...] = ()
    """What the user should know, a line each."""
    lacks: Mapping[Measure, str] = field(default_factory=dict)
    """Reasons why a call that is needed is not available."""
    usage: Usage = field(default_factory=Usage)
    """The requests that the check sent, including those that were refused."""


def cost_in_words(usage: Usage) -> str:
    """The cost of a first check, in words."""
    about = "about " if usage.estimated else ""
    return f"{usage.sent} requests, {about}{usage.tokens} tokens"
