"""The eight aspects of a rationale's quality (Lee et al. 2024), from their sources.

``metrics`` is a measure without a reference (`lmcot.rewards.metrics`, and fluency below);
``judge`` is the frozen LM's probability of "yes" to one question about the aspect. Each value is
in [0, 1], and an empty rationale has 0 of everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lmcot.config import Aspect, GuidanceRewards
from lmcot.data.prompts import PromptTemplates
from lmcot.frozen.protocol import FrozenLM
from lmcot.records import Example, Failure, Message
from lmcot.rewards import metrics

Measured = float | Failure

_TEXT_METRICS: Mapping[Aspect, Callable[[Example, str], float]] = {
    "factuality": metrics.factuality,
    "relevance": metrics.relevance,
    "coherence": metrics.coherence,
    "naturalness": metrics.naturalness,
    "readability": metrics.readability,
}
# Logicality and consistency have none; the settings see to it.


def aspect_component(aspect: Aspect) -> str:
    """The name of an aspect's component in a judgement."""
    return f"aspect/{aspect}"


def measure_aspects(
    examples: Sequence[Example],
    rationales: Sequence[str],
    *,
    rewards: GuidanceRewards,
    frozen: FrozenLM,
    templates: PromptTemplates,
) -> list[dict[str, Measured]]:
    """For each rationale the value, or failure, of every aspect that is not off, by component."""
    judged = [aspect for aspect, one in rewards.aspects.items() if one.source == "judge"]
    columns = _judged(examples, rationales, judged, frozen, templates)
    for aspect, settings in rewards.aspects.items():
        if settings.source == "metrics" and aspect == "fluency":
            columns[aspect] = _fluency(examples, rationales, frozen)
        elif settings.source == "metrics":
            metric = _TEXT_METRICS[aspect]
            columns[aspect] = [metric(e, r) for e, r in zip(examples, rationales, strict=True)]
    return [
        {
            aspect_component(aspect): columns[aspect][index]
            for aspect in rewards.aspects
            if aspect in columns
        }
        for index in range(len(examples))
    ]


def _judged(
    examples: Sequence[Example],
    rationales: Sequence[str],
    aspects: Sequence[Aspect],
    frozen: FrozenLM,
    templates: PromptTemplates,
) -> dict[Aspect, list[Measured]]:
    """The frozen LM's probability of "yes", by aspect.

    All in one call, the questions about a rationale side by side: what they begin with, context
    and rationale, is then read once for all of them.
    """
    asked = _not_empty(rationales) if aspects else []
    prompts = [
        templates.judge(examples[i], rationales[i], aspect) for i in asked for aspect in aspects
    ]
    choices = frozen.choose(prompts, ("yes", "no")) if prompts else []
    values = [c if isinstance(c, Failure) else c.probabilities["yes"] for c in choices]
    return {
        aspect: _placed(values[number :: len(aspects)], asked, len(rationales))
        for number, aspect in enumerate(aspects)
    }


def _fluency(
    examples: Sequence[Example], rationales: Sequence[str], frozen: FrozenLM
) -> list[Measured]:
    """The inverse of the rationale's perplexity under the frozen LM, after the bare question.

    ``exp(log p(rationale | question) / tokens)``: the geometric mean of the tokens'
    probabilities. Without the context, for copying from it is cheap and no sign of fluency.
    """
    asked = _not_empty(rationales)
    prompts = [(Message("user", examples[i].question),) for i in asked]
    scores = frozen.score(prompts, [rationales[i].strip() for i in asked])
    return _placed(
        [s if isinstance(s, Failure) else math.exp(s.logprob / max(1, s.tokens)) for s in scores],
        asked,
        len(rationales),
    )


def _not_empty(rationales: Sequence[str]) -> list[int]:
    return [index for index, rationale in enumerate(rationales) if rationale.strip()]


def _placed(values: Sequence[Measured], indices: Sequence[int], length: int) -> list[Measured]:
    """The values at their indices, 0 elsewhere."""
    placed: list[Measured] = [0.0] * length
    for index, value in zip(indices, values, strict=True):
        placed[index] = value
    return placed
