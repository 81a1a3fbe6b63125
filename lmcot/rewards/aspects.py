"""Measures the aspects of a rationale's quality (after Lee et al. 2024), each from its source.

``metrics`` is a measure without a reference (`lmcot.rewards.metrics`, and fluency below);
``judge`` is the frozen LM's probability of "yes" to one question about the aspect; ``learned`` is
a model of such measures (`lmcot.rewards.learned`). Each value is in [0, 1], and an empty rationale
has 0 in every aspect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmcot.config import ASPECTS, Aspect, AspectSettings, GuidanceRewards
from lmcot.data.prompts import PromptTemplates
from lmcot.errors import UserError
from lmcot.frozen.needs import Measure
from lmcot.frozen.protocol import FrozenLM
from lmcot.models.embeddings import SentenceEmbedder
from lmcot.records import Example, Failure, FailureKind, Message
from lmcot.rewards.component import Component, Context, Measured
from lmcot.rewards.learned import load_learned
from lmcot.rewards.metrics import TEXT_METRICS
from lmcot.rewards.roscoe import ROSCOE_SCORES, roscoe_scores

Columns = dict[str, list[Measured]]
"""The values of each measure, by its name: one for each rationale."""

TEXT_MEASURES = tuple(f"metrics/{aspect}" for aspect in TEXT_METRICS)
"""Metrics of the text alone."""
LIKELIHOOD_MEASURES = tuple(
    f"metrics/{name}" for name, spec in ASPECTS.items() if spec.metric == "likelihood"
)
"""Metrics that take the frozen LM's log-likelihoods."""
ROSCOE_MEASURES = tuple(f"roscoe/{name}" for name in ROSCOE_SCORES)
"""Scores that take sentence embeddings."""
JUDGE_MEASURES = tuple(f"judge/{aspect}" for aspect in ASPECTS)
"""The frozen LM's judgements."""
NEED_PASSAGES = frozenset(
    {"metrics/factuality", "roscoe/faithfulness_step", "roscoe/informativeness_step"}
)
"""Measures that compare a rationale with the passages of its question."""
MEASURES = (*TEXT_MEASURES, *LIKELIHOOD_MEASURES, *ROSCOE_MEASURES, *JUDGE_MEASURES)


@dataclass(frozen=True, slots=True)
class AspectComponent(Component):
    """The component of an aspect: its weight and its calls depend on the aspect's own settings."""

    @classmethod
    def of(cls, aspect: Aspect) -> AspectComponent:
        """The component of an aspect."""
        name = aspect_component(aspect)

        def measure(
            examples: Sequence[Example], rationales: Sequence[str], context: Context
        ) -> list[Measured]:
            return context.aspect(name, examples, rationales)

        question = ASPECTS[aspect].question
        return cls(name, f"aspects.{aspect}", "0 to 1", question, measure)

    @property
    def aspect(self) -> Aspect:
        """The name of the aspect."""
        return self.setting.removeprefix("aspects.")

    def settings(self, rewards: GuidanceRewards) -> AspectSettings:
        """The aspect's settings, with ``auto`` resolved."""
        off = AspectSettings(source="off")
        return rewards.aspects.get(self.aspect, off).resolved(ASPECTS[self.aspect])

    def weight(self, rewards: GuidanceRewards) -> float | None:
        """The aspect's weight; None where it is off."""
        settings = self.settings(rewards)
        return None if settings.source == "off" else settings.weight

    def calls(self, rewards: GuidanceRewards) -> frozenset[Measure]:
        """Calls to the frozen LM that the aspect's source takes.

        Raises:
            UserError: if the model of learned aspects cannot be read.
        """
        source = self.settings(rewards).source
        names: Sequence[str] = [f"{source}/{self.aspect}"]
        if source == "learned" and rewards.learned_model is not None:
            names = load_learned(rewards.learned_model).features
        asked = map(_call, names)
        return frozenset(call for call in asked if call is not None)

    def remedy(self, rewards: GuidanceRewards) -> str:
        """The advice where the frozen LM does not offer those calls."""
        judged = "" if "choose" in self.calls(rewards) else "its source to 'judge', "
        return f"set {judged}its weight to 0 or its source to 'off'"

    def without(self, rewards: GuidanceRewards) -> GuidanceRewards:
        """The settings with the aspect off."""
        aspects = {**rewards.aspects, self.aspect: AspectSettings(source="off")}
        return rewards.model_copy(update={"aspects": aspects})


def _call(measure: str) -> Measure | None:
    """The call to the frozen LM that a measure takes."""
    source, _, name = measure.partition("/")
    if source == "judge":
        return "choose"
    scored = source == "metrics" and name in ASPECTS and ASPECTS[name].metric == "likelihood"
    return "score" if scored else None


def aspect_component(aspect: Aspect) -> str:
    """The name of an aspect's component in a judgement."""
    return f"aspect/{aspect}"


class AspectMeter:
    """Measures rationales as the settings say, and holds the models that this needs.

    The sentence-embedding model is loaded when a measure first needs it.
    """

    def __init__(self, rewards: GuidanceRewards) -> None:
        """Reads the learned model, if an aspect is learned.

        Raises:
            UserError: if it cannot be read, lacks such an aspect, or asks for unknown features.
        """
        aspects = rewards.resolved().aspects
        self._sources = {a: one.source for a, one in aspects.items() if one.source != "off"}
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
                f"'{path}' asks for the unknown feature '{unknown[0]}': fit the aspects again"
            )

    def measure(
        self,
        examples: Sequence[Example],
        rationales: Sequence[str],
        *,
        frozen: FrozenLM | None = None,
        templates: PromptTemplates | None = None,
    ) -> list[dict[str, Measured]]:
        """The value, or failure, of each aspect that is not off, by component, for each rationale.

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
        judged = [aspect for aspect in ASPECTS if f"judge/{aspect}" in names]
        if judged and frozen is not None and templates is not None:
            columns.update(_judged(examples, rationales, judged, frozen, templates))
        if "metrics/fluency" in names and frozen is not None:
            columns["metrics/fluency"] = _fluency(examples, rationales, frozen)
        if set(names) & set(ROSCOE_MEASURES):
            columns.update(self._roscoe(examples, rationales))
        for aspect, metric in TEXT_METRICS.items():
            if f"metrics/{aspect}" in names:
                columns[f"metrics/{aspect}"] = [
                    metric(e, r) for e, r in zip(examples, rationales, strict=True)
                ]
        bare = [at for at, one in enumerate(examples) if not one.context]
        for name in NEED_PASSAGES.intersection(columns):
            for at in bare:
                columns[name][at] = Failure(FailureKind.PERMANENT, "the question has no passages")
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

    One call asks everything, with the questions about a rationale side by side: their common
    prefix, context and rationale, is then read once.
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
    probabilities, ROSCOE's Perplexity-Chain under another model. The context is left out, because
    copying from it is easy and no sign of fluency.
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
