"""Settings of the filter and the curriculum: what they mean if unset, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.config import Config, CurriculumSettings, SignalFilter, depends, parse_config
from lmcot.errors import UserError

GROUPS = {"kind": "grpo"}


def config(rewards: dict[str, Any] | None = None, **refine: Any) -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "rewards": rewards or {},
            "refine": {"start_from": "base", **refine},
        }
    )


def test_unset_nothing_is_chosen_and_an_empty_section_has_the_defaults() -> None:
    unset = config().refine
    assert unset.filter is None
    assert unset.curriculum is None
    chosen = config(filter={}, curriculum={"rest": 2}, advantage=GROUPS).refine
    assert chosen.filter == SignalFilter(by="task", refill=1.0)
    assert chosen.curriculum == CurriculumSettings(solved=2, unsolved=3, rest=2)


def test_a_stage_that_has_begun_keeps_its_choice() -> None:
    chosen = config(filter={}, curriculum={}, advantage=GROUPS)
    for key in ("refine.filter.refill", "refine.filter", "refine.curriculum.rest"):
        assert depends("refine", key, chosen)
        assert not depends("distill", key, chosen)


@pytest.mark.parametrize("kind", ["gae", "reinforce++"])
def test_a_filter_needs_a_group_baseline(kind: str) -> None:
    with pytest.raises(UserError, match=r"learns from these too, .* 'grpo' or 'rloo'") as refused:
        config(filter={}, advantage={"kind": kind})
    assert f"advantage.kind '{kind}'" in str(refused.value)
    assert config(curriculum={}, advantage={"kind": kind}, samples_per_prompt=1).refine.curriculum


@pytest.mark.parametrize(
    ("refine", "told"),
    [
        ({"filter": {}, "samples_per_prompt": 1}, "samples_per_prompt is 1"),
        ({"filter": {"refill": -0.5}}, r"refine\.filter\.refill"),
        ({"filter": {"by": "length"}}, r"refine\.filter\.by"),
        ({"filter": {"bye": "task"}}, r"unknown key 'refine\.filter\.bye': did you mean 'by'"),
        ({"curriculum": {"rest": 0}}, r"refine\.curriculum\.rest"),
        ({"curriculum": {"solved": 0}}, r"refine\.curriculum\.solved"),
        ({"curriculum": {"solved": None, "unsolved": None}}, "no question ever rests"),
    ],
)
def test_what_makes_no_sense_is_refused(refine: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        config(advantage=GROUPS, **refine)


def test_without_a_weight_of_the_answer_nothing_is_right() -> None:
    own = {"em_weight": 0.0, "f1_weight": 0.0, "custom": "mine:reward"}
    for by in ("task", "right"):
        with pytest.raises(UserError, match=rf"refine\.filter\.by is '{by}', but .* to 'reward'"):
            config(own, filter={"by": by}, advantage=GROUPS)
    with pytest.raises(UserError, match=r"refine\.curriculum is set, but .* no rationale is right"):
        config(own, curriculum={})
    assert config(own, filter={"by": "reward"}, advantage=GROUPS).refine.filter is not None
    only = {**own, "inclusion_weight": 1.0}
    assert config(only, filter={}, advantage=GROUPS).rewards.task_weights == {"inclusion": 1.0}
