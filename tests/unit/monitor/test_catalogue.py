"""docs/metrics.md describes each metric; what a run logs is looked at in test_t5_run."""

from __future__ import annotations

from pathlib import Path

from lmcot.config import AlarmSettings
from lmcot.monitor.alarms import Alarms
from lmcot.monitor.catalogue import CATALOGUE, GROUPS, describe, tables

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_page_describes_each_metric_as_tensorboard_does() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert tables() in page, "put the output of `python -m lmcot.monitor.catalogue` there"
    for name in CATALOGUE:
        group = name.partition("/")[0]
        assert group in (*GROUPS, "component", "penalty"), f"{name} would be in no table"
    assert describe("kl") != describe("kl/k3") != ""
    assert describe("component/aspect/fluency") == CATALOGUE["component/*"]
    assert describe("nobody/knows") == ""


def test_the_page_describes_each_alarm_and_its_setting() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")}
    values = {"kl": 1.0, "policy/entropy": 1.0, "reward/equal_groups": 0.0}
    values |= dict.fromkeys(("response/cut_share", "batch/judged_share", "sampler/kl"), 0.0)
    values |= dict.fromkeys(
        ("idle/learner", "idle/rollout", "answer/empty_share", "answer/cut_share"), 0.0
    )
    values |= {"sampler/effective_sample_size": 1.0, "policy/clip_fraction": 0.0}
    values |= {"filter/filled": 1.0}
    states, _ = Alarms(AlarmSettings()).look(values)
    assert len(states) == 15
    assert {name.removeprefix("alarm/") for name in states} <= rows
    for setting in AlarmSettings.model_fields:
        assert f"`{setting}`" in page, f"{setting} is not on the page"


def test_ray_can_publish_every_metric() -> None:
    """Ray refuses names and descriptions that are not ASCII, which would end a run."""
    for name, text in CATALOGUE.items():
        assert name.isascii(), name
        assert text.isascii(), name
