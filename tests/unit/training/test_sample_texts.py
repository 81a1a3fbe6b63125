"""What TensorBoard shows of rationales."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.text.text_plugin import text_array_to_html
from tensorboard.util import tensor_util

from lmcot.config import MonitorSettings
from lmcot.monitor.metrics import Monitor
from lmcot.records import Answer, Example, Failure, FailureKind, Judgement, Rollout, ScoredRollout
from lmcot.rewards.scoring import columns
from lmcot.rollout_log import encode_rollouts
from lmcot.training.sample_texts import picked, show

TEXT = "It is *red* | <b>.\nSo the answer is red."
ROLLOUT = Rollout("u", "q1", 0, (1,), (2, 3), (-0.1, -0.2), "length", TEXT, 0)
FAILED = Judgement(failure=Failure(FailureKind.TRANSIENT, "the endpoint hangs"))


def judgement(reward: float) -> Judgement:
    return Judgement({"em": reward, "aspect/fluency": 0.5}, Answer("Red.", "red_1", 9, 2), True)


def test_the_best_the_worst_and_what_lies_between() -> None:
    rewards = np.array([0.3, 0.9, math.nan, 0.1, 0.7, 0.5])
    assert picked(rewards, 3) == [1, 5, 3]
    assert picked(rewards, 2) == [1, 3]
    assert picked(rewards, 1) == [5]
    assert picked(rewards, 9) == [1, 4, 5, 0, 3], "what was not judged has no place"


def test_rationales_and_spreads_are_shown_when_they_are_due(tmp_path: Path) -> None:
    settings = MonitorSettings(histograms_every=2, samples_every=3, samples=2, ray_metrics=False)
    example = Example("q1", "Which colour?", "red", ())
    judgements = [judgement(0.0), FAILED, judgement(1.0), judgement(0.5)]
    rollouts = [ROLLOUT] * 4
    scored = [
        None
        if one is FAILED
        else ScoredRollout(ROLLOUT, one, one.components["em"], {"penalty/length": 0.25})
        for one in judgements
    ]
    numbers = columns(rollouts, judgements, scored)
    lines = encode_rollouts(rollouts, judgements, scored, {"q1": example})
    with Monitor(tmp_path, settings) as monitor:
        for step in range(1, 7):
            show(monitor, step, "refine", numbers, lines)
            monitor.log(step, "refine", {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "refine"))
    events.Reload()
    assert [event.step for event in events.Tensors("samples")] == [1, 3, 6]
    for tag in ("reward", "response/length", "component/em", "component/aspect/fluency"):
        assert [event.step for event in events.Tensors(f"spread/{tag}")] == [1, 2, 4, 6]
    text = tensor_util.make_ndarray(events.Tensors("samples")[0].tensor_proto)
    page = text_array_to_html(text, True)
    assert page.count("<h4>") == 2
    assert "Reward 1: question q1, 2 tokens, cut at the length limit" in page
    assert "Which colour?" in page
    assert "It is *red* | &lt;b&gt;." in page, "what the policy wrote is no markup"
    assert "<strong>Frozen LM:</strong> red_1" in page
    assert "<td>-0.25</td>" in page, "penalties are taken off"
