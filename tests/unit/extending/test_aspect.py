"""The aspect of docs/extending.md is measured, judged and weighed as those of lmcot are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmcot.config import ASPECTS, AspectSettings, GuidanceRewards, aspects, parse_config
from lmcot.data import load_templates
from lmcot.errors import UserError
from lmcot.records import Example, Paragraph
from lmcot.rewards import metrics
from lmcot.rewards.aspects import AspectComponent, AspectMeter
from lmcot.rewards.components import component_weights
from tests.support.worked import python_blocks

EXAMPLE = Example("1", "Which river?", "Brann", (Paragraph("Velm", ("It lies on the Brann.",)),))
LEAST: dict[str, Any] = {
    "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
    "policy": {"source": "random:llama"},
    "frozen": {"backend": "transformers", "source": "random:llama"},
    "refine": {"start_from": "base"},
}


@pytest.fixture(autouse=True)
def _extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables with what the page says to add."""
    spec, function, row = python_blocks("An aspect")
    names: dict[str, Any] = dict(vars(metrics))
    exec(function, names)
    for name, one in eval(f"{{{spec}}}", dict(vars(aspects))).items():
        monkeypatch.setitem(ASPECTS, name, one)
    for name, one in eval(f"{{{row}}}", names).items():
        monkeypatch.setitem(metrics.TEXT_METRICS, name, one)


def test_it_is_measured_by_default() -> None:
    rewards = GuidanceRewards()
    assert rewards.aspects["specificity"] == AspectSettings(source="auto", weight=0)
    others = {name: AspectSettings(source="off") for name in ASPECTS if name != "specificity"}
    meter = AspectMeter(rewards.model_copy(update={"aspects": {**rewards.aspects, **others}}))
    texts = ["Velm lies on the Brann. It is long.", "It rained in 1911.", ""]
    found = meter.measure([EXAMPLE] * 3, texts)
    assert found == [{"aspect/specificity": value} for value in (0.5, 1.0, 0.0)]


def test_it_has_settings() -> None:
    values = {**LEAST, "rewards": {"aspects": {"specificity": {"weight": 0.5}}}}
    rewards = parse_config(values).rewards
    assert isinstance(rewards, GuidanceRewards)
    assert component_weights(rewards)["aspect/specificity"] == 0.5
    wrong = {**LEAST, "rewards": {"aspects": {"specifity": {"weight": 0.5}}}}
    with pytest.raises(UserError, match=re.escape("did you mean 'specificity'?")):
        parse_config(wrong)


def test_it_can_be_judged(tmp_path: Path) -> None:
    """By its own question, or by that of the templates."""
    templates = load_templates("default")
    question = "Does the reasoning name exact people, places or dates?"
    assert templates.judge(EXAMPLE, "So.", "specificity")[-1].content.endswith(question)
    rewards = GuidanceRewards(aspects={"specificity": AspectSettings(source="judge")})
    assert AspectComponent.of("specificity").calls(rewards) == {"choose"}

    values = templates.file.model_dump(mode="json")
    values["judge"]["aspects"] = {"specificity": "Is it exact?"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    own = load_templates(str(tmp_path / "own.yaml"))
    assert own.judge(EXAMPLE, "So.", "specificity")[-1].content.endswith("Is it exact?")
