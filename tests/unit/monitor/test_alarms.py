"""Alarms: raised by their cause, told once, cleared when it is long gone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lmcot.config import AlarmSettings
from lmcot.monitor.alarms import Alarms, how_to_change

SOUND = {
    "kl": 2.0,
    "policy/entropy": 1.0,
    "reward/equal_groups": 0.3,
    "response/cut_share": 0.1,
    "answer/empty_share": 0.0,
    "answer/cut_share": 0.1,
    "batch/judged_share": 1.0,
    "batch/staleness": 1.0,
    "sampler/kl": 1e-4,
    "sampler/effective_sample_size": 0.98,
    "policy/clip_fraction": 0.1,
    "idle/learner": 0.2,
    "idle/rollout": 0.2,
    "optimiser/skipped_updates": 0.0,
    "loss/policy": 0.1,
    "filter/filled": 0.9,
}


def looked(steps: list[dict[str, Any]], **settings: Any) -> list[tuple[set[str], list[str]]]:
    """Of each step, the alarms that are raised and the lines that are told."""
    alarms = Alarms(AlarmSettings(**settings), window=3, clears_after=3)
    found = []
    for step in steps:
        states, told = alarms.look({**SOUND, **step})
        raised = {name.removeprefix("alarm/") for name, state in states.items() if state}
        found.append((raised, told))
    return found


@pytest.mark.parametrize(
    ("bad", "name", "advice"),
    [
        ({"kl": 51.0}, "kl_high", "refine.kl.coefficient"),
        ({"kl": -0.6}, "kl_negative", "sampler/gap"),
        ({"policy/entropy": 0.01}, "entropy_collapse", "refine.entropy_coefficient"),
        ({"reward/equal_groups": 0.95}, "no_signal", "refine.samples_per_prompt"),
        ({"filter/filled": 0.25}, "unfilled_steps", r"only 47% .* refine\.filter\.refill"),
        ({"response/cut_share": 0.75}, "length_limit", "policy.max_new_tokens"),
        (
            {"answer/empty_share": 0.5},
            "empty_answers",
            "held no answer .* frozen.max_thinking_tokens",
        ),
        ({"answer/cut_share": 0.9}, "cut_answers", "were cut .* frozen.max_answer_tokens"),
        ({"batch/judged_share": 0.9}, "failed_judgements", "only 90% .* endpoint"),
        ({"sampler/kl": 0.03}, "sampler_mismatch", "policy.dtype"),
        (
            {"sampler/effective_sample_size": 0.3},
            "uneven_weights",
            r"counted as 30% of their number .* below 50%: lower refine\.max_staleness",
        ),
        ({"policy/clip_fraction": 0.8}, "much_clipping", "57% of the tokens .* refine.epochs"),
        ({"idle/learner": 0.6}, "idle_learner", "60% .* frozen actors"),
        ({"idle/rollout": 0.6}, "idle_rollout", "60% .* the judging is slower"),
        ({"loss/policy": None}, "not_finite", "loss/policy is not finite.*learning_rate"),
        ({"optimiser/skipped_updates": 2.0}, "not_finite", r"2 update\(s\) were skipped"),
    ],
)
def test_each_alarm_has_its_cause_is_told_once_and_clears(
    bad: dict[str, Any], name: str, advice: str
) -> None:
    found = looked([{}] * 3 + [bad] * 4 + [{}] * 5 + [bad] * 3)
    assert all(raised <= {name} for raised, _ in found), "nothing else is raised"
    told = [(step, line) for step, (_, lines) in enumerate(found) for line in lines]
    assert len(told) == 2, "once, and again after it had cleared"
    assert all(line.startswith(f"{name}: ") and "\n" not in line for _, line in told)
    assert re.search(advice, told[0][1]), told[0][1]
    first = told[0][0]
    assert 3 <= first < 7
    assert found[6][0] == {name}
    assert found[11][0] == set()


def test_a_mean_waits_for_its_steps_and_passes_over_a_single_one() -> None:
    once = looked([{}, {}, {"response/cut_share": 1.0}, {}, {}])
    assert not any(raised for raised, _ in once)
    early = looked([{"response/cut_share": 1.0}] * 3)
    assert [bool(raised) for raised, _ in early] == [False, False, True]


def test_what_takes_turns_is_not_starved() -> None:
    waiting = {"idle/learner": 0.9, "idle/rollout": 0.9, "batch/staleness": 0.0}
    assert not any(raised for raised, _ in looked([waiting] * 6))


def test_an_alarm_can_be_switched_off_and_needs_its_metric() -> None:
    assert not any(raised for raised, _ in looked([{"kl": 99.0}] * 3, kl_above=None))
    assert not any(raised for raised, _ in looked([{"kl": None}] * 3, not_finite=False))
    states, _ = Alarms(AlarmSettings()).look({"loss": 1.0})
    assert states == {"alarm/not_finite": 0.0}


def test_an_alarm_says_which_of_its_settings_take_a_new_run() -> None:
    said = how_to_change("raise refine.kl.coefficient, or policy.max_new_tokens; see rollouts/")
    assert said == (
        " (the same command resumes with another refine.kl.coefficient; another "
        "policy.max_new_tokens takes a new --run-dir)"
    )
    assert how_to_change("lower refine.optimiser.learning_rate") == (
        " (the same command resumes with another refine.optimiser.learning_rate)"
    )
    assert how_to_change("check the endpoint") == ""
    ((_, told),) = looked([{"kl": 51.0}])
    assert told[0].endswith(
        "(the same command resumes with another refine.kl.coefficient, "
        "refine.optimiser.learning_rate, refine.target_kl)"
    )
