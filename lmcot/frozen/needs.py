"""What a run will ask of its frozen LM, and what a first check of it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lmcot.config import FrozenSettings
from lmcot.records import Prompt, Sampling, Usage

Measure = Literal["choose", "score"]
"""A call of the `FrozenLM` protocol that not every endpoint offers."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run will ask."""

    completions: tuple[tuple[Prompt, Sampling], ...]
    """One request of each form: the same lengths, temperatures, seeds and stop strings."""
    choices: tuple[Prompt, ...] = ()
    """Some of the judge's questions; none where nothing is judged."""
    scores: bool = False
    """Whether log-likelihoods of given texts are asked for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a first check found."""

    settings: FrozenSettings
    """With what was learned of the endpoint: all that asks it must have these."""
    notices: tuple[str, ...] = ()
    """What the user should know, a line each."""
    lacks: Mapping[Measure, str] = field(default_factory=dict)
    """Why a call that is needed cannot be had."""
    usage: Usage = field(default_factory=Usage)
    """What the check itself asked: each request that was sent, also those that were refused."""


def cost_in_words(usage: Usage) -> str:
    """What a first check asked, for people."""
    about = "about " if usage.estimated else ""
    return f"{usage.sent} requests, {about}{usage.tokens} tokens"
