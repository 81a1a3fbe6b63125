"""What the components of a judgement ask of the frozen LM, beside its answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from lmcot.config import AspectSettings, GuidanceRewards
from lmcot.frozen.needs import Measure
from lmcot.rewards.learned import load_learned


@dataclass(frozen=True, slots=True)
class Component:
    """A component that is measured by the frozen LM."""

    setting: str
    """The key of the settings that asks for it."""
    weight: float
    measures: frozenset[Measure]
    """The calls that it takes."""
    remedy: str
    """What to set where they cannot be had."""


def components(rewards: GuidanceRewards) -> Iterator[Component]:
    """Those that the settings ask for.

    Raises:
        UserError: if the model of learned aspects cannot be read.
    """
    for name, aspect in rewards.aspects.items():
        measures = _aspect_measures(rewards, aspect, name == "fluency")
        if measures:
            judged = "" if "choose" in measures else "its source to 'judge', "
            yield Component(
                f"rewards.aspects.{name}",
                aspect.weight,
                measures,
                f"set {judged}its weight to 0 or its source to 'off'",
            )
    if rewards.likelihood_gain_weight is not None:
        yield Component(
            "rewards.likelihood_gain_weight",
            rewards.likelihood_gain_weight,
            frozenset({"score"}),
            "leave it out",
        )


def without(rewards: GuidanceRewards, settings: Collection[str]) -> GuidanceRewards:
    """The rewards without the components of these settings."""
    aspects = {
        name: AspectSettings(source="off") if f"rewards.aspects.{name}" in settings else aspect
        for name, aspect in rewards.aspects.items()
    }
    gain = rewards.likelihood_gain_weight
    if "rewards.likelihood_gain_weight" in settings:
        gain = None
    return rewards.model_copy(update={"aspects": aspects, "likelihood_gain_weight": gain})


def _aspect_measures(
    rewards: GuidanceRewards, aspect: AspectSettings, fluency: bool
) -> frozenset[Measure]:
    if aspect.source == "judge":
        return frozenset({"choose"})
    if aspect.source == "metrics" and fluency:
        return frozenset({"score"})
    if aspect.source != "learned" or rewards.learned_model is None:
        return frozenset()
    features = load_learned(rewards.learned_model).features
    found: set[Measure] = set()
    if any(name.startswith("judge/") for name in features):
        found.add("choose")
    if "metrics/fluency" in features:
        found.add("score")
    return frozenset(found)
