"""The tables of components and aspects, and what the pages say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcot.config import ASPECTS, AspectSettings, GuidanceRewards
from lmcot.rewards.aspects import AspectComponent
from lmcot.rewards.component import Component
from lmcot.rewards.components import COMPONENTS, component_weights, components, measured_components
from lmcot.rewards.metrics import TEXT_METRICS

PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"


def rows() -> dict[str, list[str]]:
    """The cells of the page's tables, by the first one."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {one[0].strip("`"): one[1:] for one in cells}


def test_the_page_describes_each_component() -> None:
    for one in COMPONENTS:
        default = one.weight(GuidanceRewards())
        weight = "off" if default is None else f"{default:g}"
        expected = [one.values, f"`{one.setting}` ({weight})", one.meaning]
        assert rows()[one.name] == expected, "put the row into the table of docs/rewards.md"


def test_the_page_describes_each_aspect() -> None:
    resolved = GuidanceRewards().resolved().aspects
    for name, spec in ASPECTS.items():
        metric, *others = rows()[name]
        assert (metric == "\N{EN DASH}") is (spec.metric is None)
        assert others == ["yes", "yes", f"`{resolved[name].source}`"]


def test_each_metric_is_there() -> None:
    assert {name for name, spec in ASPECTS.items() if spec.metric == "text"} == set(TEXT_METRICS)


def test_names_and_settings_are_distinct_and_have_weights() -> None:
    found = components()
    assert len({one.name for one in found}) == len({one.setting for one in found}) == len(found)
    own = {name for name in GuidanceRewards.model_fields if name.endswith("_weight")}
    assert {one.setting for one in COMPONENTS} == own - {"custom_weight"}


def test_what_is_not_asked_for_is_neither_measured_nor_weighed() -> None:
    off = {"fluency": AspectSettings(source="off"), "relevance": AspectSettings(weight=0.5)}
    rewards = GuidanceRewards(aspects=off)
    names = ["em", "f1", "inclusion", "aspect/relevance"]
    assert [one.name for one in measured_components(rewards)] == names
    assert component_weights(rewards) == dict(zip(names, (0.5, 0.5, 0.0, 0.5), strict=True))


TAKEN_OUT = [one for one in components() if one.calls(GuidanceRewards())]


@pytest.mark.parametrize("component", TAKEN_OUT, ids=lambda one: str(one.name))
def test_a_component_can_be_taken_out(component: Component) -> None:
    rewards = GuidanceRewards(likelihood_gain_weight=0.0, choice_probability_weight=0.0)
    assert component.weight(rewards) is not None
    without = component.without(rewards)
    assert component.weight(without) is None
    assert len(measured_components(without)) == len(measured_components(rewards)) - 1


def test_an_aspect_takes_the_calls_of_its_source() -> None:
    calls = {name: AspectComponent.of(name).calls(GuidanceRewards()) for name in ASPECTS}
    assert calls.pop("fluency") == {"score"}
    assert calls.pop("logicality") == calls.pop("consistency") == {"choose"}
    assert set(calls.values()) == {frozenset()}
    judged = GuidanceRewards(aspects={"fluency": AspectSettings(source="judge")})
    assert AspectComponent.of("fluency").calls(judged) == {"choose"}


def test_weights_are_added_up_in_the_order_of_measurement() -> None:
    """Sums of floats depend on it: a resumed run must add as it did."""
    rewards = GuidanceRewards(likelihood_gain_weight=0.1)
    names = ["em", "f1", "inclusion", *(f"aspect/{name}" for name in ASPECTS), "likelihood_gain"]
    assert list(component_weights(rewards)) == names
