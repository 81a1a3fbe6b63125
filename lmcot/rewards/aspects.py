"""The eight aspects of a rationale's quality (Lee et al. 2024), from their sources.

``metrics`` is a measure without a reference (`lmcot.rewards.metrics`, and fluency below);
``judge`` is the frozen LM's probability of "yes" to one question about the aspect; ``learned`` is
a model of such measures (`lmcot.rewards.learned`). Each value is in [0, 1], and an empty rationale
has 0 of everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from lmcot.config import Aspect, GuidanceRewards
from lmcot.data.prompts import PromptTemplates
from lmcot.errors import UserError
from lmcot.frozen.protocol import FrozenLM
from lmcot.records import Example, Failure, Message
from lmcot.rewards import metrics
from lmcot.rewards.embeddings import ROSCOE_SCORES, SentenceEmbedder, roscoe_scores
from lmcot.rewards.learned import load_learned

Measured = float | Failure
Columns = dict[str, list[Measured]]
"""By a measure's name, its value for each rationale."""

_TEXT_METRICS: Mapping[str, Callable[[Example, str], float]] = {
    "metrics/factuality": metrics.factuality,
    "metrics/relevance": metrics.relevance,
    "metrics/coherence": metrics.coherence,
    "metrics/naturalness": metrics.naturalness,
    "metrics/readability": metrics.readability,
}
# Logicality and consistency have none; the settings see to it.
_FLUENCY = "metrics/fluency"
TEXT_MEASURES = tuple(_TEXT_METRICS)
"""Metrics of the text alone."""
ROSCOE_MEASURES = tuple(f"roscoe/{name}" for name in ROSCOE_SCORES)
"""Scores that take sentence embeddings."""
JUDGE_MEASURES = tuple(f"judge/{aspect}" for aspect in get_args(Aspect))
"""The frozen LM's judgements."""
MEASURES = (*TEXT_MEASURES, _FLUENCY, *ROSCOE_MEASURES, *JUDGE_MEASURES)


def aspect_component(aspect: Aspect) -> str:
    """The name of an aspect's component in a judgement."""
    return f"aspect/{aspect}"


class AspectMeter:
    """Measures rationales as the settings say; it holds the models that this takes.

    The sentence-embedding model is loaded when a measure first needs it.
    """

    def __init__(self, rewards: GuidanceRewards) -> None:
        """Reads the learned model, if an aspect is learned.

        Raises:
            UserError: if it cannot be read, lacks such an aspect, or asks for unknown features.
        """
        self._sources = {a: one.source for a, one in rewards.aspects.items() if one.source != "off"}
        self._embeddings = rewards.embeddings
        self._embedder: SentenceEmbedder | None = None
        learned = [aspect for aspect, source in self._sources.items() if source == "learned"]
        path = rewards.learned_model
        self._learned = load_learned(path) if learned and path is not None else None
        if self._learned is None:
            return
        for aspect in learned:
            if aspect not in self._learned.aspects:
                raise UserError(
                    f"'{path}' has not learned {aspect}, only {', '.join(self._learned.aspects)}: "
                    f"set rewards.aspects.{aspect}.source to another, or fit it to labels"
                )
        unknown = [name for name in self._learned.features if name not in MEASURES]
        if unknown:
            raise UserError(
                f"'{path}' asks for the unknown feature '{unknown[0]}': fit the aspects anew"
            )

    def measure(
        self,
        examples: Sequence[Example],
        rationales: Sequence[str],
        *,
        frozen: FrozenLM | None = None,
        templates: PromptTemplates | None = None,
    ) -> list[dict[str, Measured]]:
        """For each rationale the value, or failure, of every aspect that is not off, by component.

        Raises:
            UserError: if the learned model was fitted to another frozen LM's judgements.
        """
        direct = [f"{source}/{a}" for a, source in self._sources.items() if source != "learned"]
        features = self._learned.features if self._learned else ()
        if self._learned is not None:
            self._learned.check_frozen(frozen.identity if frozen is not None else None)
        names = list(dict.fromkeys([*direct, *features]))
        columns = self.columns(names, examples, rationales, frozen=frozen, templates=templates)
        for aspect, source in self._sources.items():
            if source == "learned":
                columns[f"learned/{aspect}"] = self._predicted(aspect, columns, rationales)
        return [
            {aspect_component(a): columns[f"{s}/{a}"][i] for a, s in self._sources.items()}
            for i in range(len(rationales))
        ]

    def columns(
        self,
        names: Sequence[str],
        examples: Sequence[Example],
        rationales: Sequence[str],
        *,
        frozen: FrozenLM | None = None,
        templates: PromptTemplates | None = None,
    ) -> Columns:
        """Measures by name: ``metrics/ASPECT``, ``roscoe/SCORE`` or ``judge/ASPECT``.

        ``frozen`` and ``templates`` are needed for judgements, ``frozen`` for ``metrics/fluency``.
        """
        columns: Columns = {}
        judged: list[Aspect] = [a for a in get_args(Aspect) if f"judge/{a}" in names]
        if judged and frozen is not None and templates is not None:
            columns.update(_judged(examples, rationales, judged, frozen, templates))
        if _FLUENCY in names and frozen is not None:
            columns[_FLUENCY] = _fluency(examples, rationales, frozen)
        if set(names) & set(ROSCOE_MEASURES):
            columns.update(self._roscoe(examples, rationales))
        for name in set(names) & set(TEXT_MEASURES):
            metric = _TEXT_METRICS[name]
            columns[name] = [metric(e, r) for e, r in zip(examples, rationales, strict=True)]
        return {name: columns[name] for name in names}

    def _roscoe(self, examples: Sequence[Example], rationales: Sequence[str]) -> Columns:
        if self._embedder is None:
            self._embedder = SentenceEmbedder(self._embeddings)
        scores = roscoe_scores(examples, rationales, self._embedder)
        return {f"roscoe/{name}": [one[name] for one in scores] for name in ROSCOE_SCORES}

    def _predicted(
        self, aspect: Aspect, columns: Columns, rationales: Sequence[str]
    ) -> list[Measured]:
        assert self._learned is not None
        names = self._learned.features
        predicted: list[Measured] = []
        for index, rationale in enumerate(rationales):
            values = {name: columns[name][index] for name in names}
            failure = next((v for v in values.values() if isinstance(v, Failure)), None)
            features = {name: v for name, v in values.items() if not isinstance(v, Failure)}
            if failure is not None or not rationale.strip():
                predicted.append(failure or 0.0)
            else:
                predicted.append(self._learned.predict(aspect, features))
        return predicted


def _judged(
    examples: Sequence[Example],
    rationales: Sequence[str],
    aspects: Sequence[Aspect],
    frozen: FrozenLM,
    templates: PromptTemplates,
) -> Columns:
    """The frozen LM's probability of "yes", by aspect.

    All in one call, the questions about a rationale side by side: what they begin with, context
    and rationale, is then read once for all of them.
    """
    asked = _not_empty(rationales)
    prompts = [
        templates.judge(examples[i], rationales[i], aspect) for i in asked for aspect in aspects
    ]
    choices = frozen.choose(prompts, ("yes", "no")) if prompts else []
    values = [c if isinstance(c, Failure) else c.probabilities["yes"] for c in choices]
    return {
        f"judge/{aspect}": _placed(values[number :: len(aspects)], asked, len(rationales))
        for number, aspect in enumerate(aspects)
    }


def _fluency(
    examples: Sequence[Example], rationales: Sequence[str], frozen: FrozenLM
) -> list[Measured]:
    """The inverse of the rationale's perplexity under the frozen LM, after the bare question.

    ``exp(log p(rationale | question) / tokens)``: the geometric mean of the tokens'
    probabilities, ROSCOE's Perplexity-Chain under another model. Without the context, for copying
    from it is cheap and no sign of fluency.
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
