"""Settings of the learner: what variants tell of themselves, and keys of older files."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from lmcot.config import (
    Config,
    Gae,
    Grpo,
    GspoLoss,
    ModelCritic,
    PpoLoss,
    ReinforcePlusPlus,
    Rloo,
    depends,
    differences,
    dump_config,
    parse_config,
)
from lmcot.config.training import CriticBaseline
from lmcot.errors import UserError


def config(**refine: Any) -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:counting-llama"},
            "rewards": {"kind": "increasing"},
            "refine": {"start_from": "base", **refine},
        }
    )


def test_estimators_say_what_they_need() -> None:
    gae = Gae(critic=ModelCritic(kind="model", source="random:llama"))
    assert gae.needs_critic
    assert not gae.needs_group
    assert gae.critic_baseline is gae
    assert isinstance(gae, CriticBaseline)
    for group in (Rloo(kind="rloo"), Grpo(kind="grpo")):
        assert group.needs_group
        assert group.same_for_all_tokens
        assert not group.needs_critic
        assert group.critic_baseline is None


def test_reinforce_plus_plus_needs_nothing() -> None:
    plus = ReinforcePlusPlus(kind="reinforce++")
    assert {plus.needs_group, plus.needs_critic, plus.same_for_all_tokens} == {False}
    one_each = config(advantage={"kind": "reinforce++"}, samples_per_prompt=1)
    assert one_each.refine.advantage == plus


@pytest.mark.parametrize("advantage", ["gae", "reinforce++"])
def test_a_ratio_of_whole_rationales_needs_an_advantage_of_whole_rationales(
    advantage: str,
) -> None:
    expected = (
        r"loss\.kind 'gspo' has one ratio for a whole rationale, but advantage\.kind "
        rf"'{re.escape(advantage)}' gives each token .* set advantage\.kind to 'grpo' or 'rloo'"
    )
    with pytest.raises(UserError, match=expected):
        config(loss={"kind": "gspo"}, advantage={"kind": advantage})
    fits = config(loss={"kind": "gspo"}, advantage={"kind": "rloo"}).refine.loss
    assert fits == GspoLoss(kind="gspo")
    assert fits.aggregation == "sequence_mean"
    assert PpoLoss().aggregation == "token_mean"


def test_a_length_that_is_not_used_is_refused() -> None:
    expected = r"aggregation_length is 64, but aggregation is 'token_mean', which does not use it"
    with pytest.raises(UserError, match=expected):
        config(loss={"aggregation_length": 64})
    constant = config(loss={"aggregation": "constant", "aggregation_length": 64}).refine.loss
    assert isinstance(constant, PpoLoss)
    assert constant.clip == 0.2, "the default's other keys hold"


def test_losses_have_their_own_keys() -> None:
    with pytest.raises(UserError, match=r"unknown key 'refine\.loss\.clip'"):
        config(loss={"kind": "gspo", "clip": 0.1}, advantage={"kind": "grpo"})
    with pytest.raises(UserError, match=r"unknown key 'refine\.loss\.dual_clip'"):
        config(loss={"kind": "cispo", "dual_clip": 3.0})
    with pytest.raises(UserError, match=r"'refine\.loss\.clip_low' is 1\.5"):
        config(loss={"clip_low": 1.5})


def test_bounds_of_the_ratio_may_change_in_a_run_and_the_loss_may_not() -> None:
    for key in ("clip", "clip_low", "clip_high", "dual_clip"):
        assert not depends("refine", f"refine.loss.{key}", config())
    for key in ("kind", "aggregation", "aggregation_length"):
        assert depends("refine", f"refine.loss.{key}", config())


def test_critics_say_whether_they_have_a_trunk_of_their_own() -> None:
    assert not Gae().critic.own_trunk
    assert Gae().critic.source is None
    own = Gae(critic=ModelCritic(kind="model", source="random:llama")).critic
    assert own.own_trunk
    assert own.source == "random:llama"


def test_what_an_estimator_needs_is_no_setting() -> None:
    """An older run's settings have no such keys, and resuming it compares all keys."""
    assert set(Gae().model_dump()) == {
        *("kind", "gamma", "lam", "critic"),
        *("value_clip", "value_coefficient", "critic_warmup_steps"),
    }
    assert set(Gae().model_dump()["critic"]) == {"kind", "learning_rate"}


def test_keys_of_older_files_are_read_as_the_loss() -> None:
    old = config(clip=0.1, dual_clip=3.0)
    assert old.refine.loss == PpoLoss(clip=0.1, dual_clip=3.0)
    new = config(loss={"kind": "ppo", "clip": 0.1, "dual_clip": 3.0})
    assert differences(old, new) == {}
    assert config(clip=0.3, loss={"dual_clip": 2.0}).refine.loss == PpoLoss(clip=0.3, dual_clip=2.0)
    dumped = yaml.safe_load(dump_config(old))
    assert "clip" not in dumped["refine"]
    assert differences(parse_config(dumped), old) == {}


def test_two_values_under_both_names_are_refused() -> None:
    expected = r"refine\.clip is now refine\.loss\.clip, but both are set: remove refine\.clip"
    with pytest.raises(UserError, match=expected):
        config(clip=0.1, loss={"clip": 0.2})


def test_a_wrong_value_under_an_older_name_is_told() -> None:
    with pytest.raises(UserError, match=r"^'refine\.loss\.dual_clip' is 0\.5: it should be"):
        config(dual_clip=0.5)
    with pytest.raises(UserError, match=r"^'refine\.loss' is 7: it should be a mapping"):
        config(loss=7)


@pytest.mark.parametrize("dtype", ["float16", "half", "torch.float16"])
def test_float16_is_no_choice(dtype: str) -> None:
    """[10] T5 overflows in it."""
    values = yaml.safe_load(dump_config(config()))
    values["policy"]["dtype"] = dtype
    expected = rf"^'policy\.dtype' is '{dtype}': it should be 'auto', 'float32' or 'bfloat16'"
    with pytest.raises(UserError, match=expected):
        parse_config(values)
