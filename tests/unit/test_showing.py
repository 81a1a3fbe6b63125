"""What TensorBoard shows of rationales."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.text.text_plugin import text_array_to_html
from tensorboard.util import tensor_util

from lmcot.config import MonitorSettings
from lmcot.monitor.metrics import Monitor
from lmcot.records import Answer, Example, Judgement, Rollout, ScoredRollout
from lmcot.stages.showing import picked, show


def scored(reward: float, text: str = "It is *red* | <b>.\nSo the answer is red.") -> ScoredRollout:
    rollout = Rollout("u", "q1", 0, (1,), (2, 3), (-0.1, -0.2), "length", text, 0)
    judgement = Judgement(
        {"em": reward, "aspect/fluency": 0.5}, Answer("Red.", "red_1", 9, 2), True
    )
    return ScoredRollout(rollout, judgement, reward, {"penalty/length": 0.25})


def test_the_best_the_worst_and_what_lies_between() -> None:
    all_of_them = [scored(reward / 10) for reward in (3, 9, 1, 7, 5)]
    assert [one.reward for one in picked(all_of_them, 3)] == [0.9, 0.5, 0.1]
    assert [one.reward for one in picked(all_of_them, 2)] == [0.9, 0.1]
    assert [one.reward for one in picked(all_of_them, 1)] == [0.5]
    assert len(picked(all_of_them, 9)) == 5


def test_rationales_and_spreads_are_shown_when_they_are_due(tmp_path: Path) -> None:
    settings = MonitorSettings(histograms_every=2, samples_every=3, samples=2, ray_metrics=False)
    examples = {"q1": Example("q1", "Which colour?", "red", ())}
    with Monitor(tmp_path, settings) as monitor:
        for step in range(1, 7):
            show(monitor, step, "refine", examples, [scored(1.0), scored(0.0), scored(0.5)])
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
