"""The aspects of a rationale's quality: everything that names one asks this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticKnownError


@dataclass(frozen=True, slots=True)
class AspectSpec:
    """What an aspect asks of a rationale."""

    question: str
    """The yes/no question that the frozen LM judges it by, unless the templates have another."""
    metric: Literal["text", "likelihood"] | None
    """What its metric is computed from: the text alone (`lmcot.rewards.metrics`), or the frozen
    LM's log-likelihoods; None: no honest metric is known, only a judge can say."""


ASPECTS: dict[str, AspectSpec] = {
    "factuality": AspectSpec(
        "Is every statement in the reasoning supported by the context?", metric="text"
    ),
    "relevance": AspectSpec(
        "Is everything in the reasoning relevant to the question?", metric="text"
    ),
    # Whether statements follow from each other and agree takes understanding.
    "logicality": AspectSpec(
        "Does the conclusion follow from the statements in the reasoning?", metric=None
    ),
    "consistency": AspectSpec("Is the reasoning free of contradictions?", metric=None),
    "coherence": AspectSpec(
        "Do the sentences of the reasoning build on each other in a sensible order?", metric="text"
    ),
    "fluency": AspectSpec("Is the reasoning written in correct English?", metric="likelihood"),
    "naturalness": AspectSpec("Does the reasoning sound as if a person wrote it?", metric="text"),
    "readability": AspectSpec("Is the reasoning easy to read and understand?", metric="text"),
}


def _is_known(name: str) -> str:
    if name not in ASPECTS:
        raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, ASPECTS))})
    return name


Aspect = Annotated[str, AfterValidator(_is_known)]
"""The name of an aspect."""
