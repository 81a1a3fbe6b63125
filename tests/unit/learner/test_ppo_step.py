"""One PPO step through the real DeepSpeed engine, against plain loops over single responses."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from lmcot.learner.session import LearnerSession
from lmcot.records import ScoredRollout
from tests.support.learner_by_hand import (
    alone,
    global_norm,
    gradients,
    loss_by_hand,
    plain_policy,
    stateless_step,
)
from tests.support.learner_cases import (
    BOTH,
    EVERY_LAYOUT,
    KINDS,
    LAYOUTS,
    LORA,
    STATELESS,
    TOKENS,
    Layout,
    distance,
    disturb,
    fixed_kl,
    make_config,
    off_policy,
    open_session,
    parameters,
    rollouts,
)

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

GAE = {"kind": "gae", "gamma": 0.9, "lam": 0.8, "value_coefficient": 0.3}
CRITIC = {**GAE, "critic": {"kind": "model"}}
RLOO = {"kind": "rloo"}
GRPO = {"kind": "grpo"}
DR_GRPO = {"kind": "grpo", "normalise": False}
VALUE_METRICS = {"value/mean", "value/return", "value/explained_variance", "loss/value"}

# ---------------------------------------------------------------- the first pass over a batch


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]], ids=str)
def test_first_minibatch_has_ratio_one(kind: str, temperature: float, layout: Layout) -> None:
    """[8] [2] first minibatch of the first epoch: approx KL 0, clip fraction 0, ratio 1.

    Not to the bit, for torch multiplies by another kernel where it keeps what a gradient needs:
    log-probabilities differ by up to 1e-7, whose k3 is below 1e-12.
    """
    session = open_session(make_config(kind, layout=layout, policy__temperature=temperature))
    metrics = session.ppo.step(rollouts(kind, temperature=temperature), 0)
    assert 0 <= metrics["policy/approx_kl"] < 1e-12
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["sampler/gap"] < 1e-5
    assert metrics["sampler/importance_weight"] == pytest.approx(1, abs=1e-5)
    # At ratio 1 the loss is minus the mean of the whitened advantages, which is 0.
    assert metrics["loss/policy"] == pytest.approx(0, abs=1e-5)


@BOTH
@pytest.mark.parametrize("share", [True, False])
def test_old_logprobs_within_tolerance_where_micro_batches_differ(kind: str, share: bool) -> None:
    """[8] each minibatch has micro-batches unlike those that were scored: equal within 1e-6."""
    layout = Layout(2, 30, share)
    session = open_session(make_config(kind, {"learning_rate": 1e-9}, layout, minibatches=3))
    metrics = session.ppo.step(rollouts(kind, questions=[(3, (4, 4, 4)), (3, (4, 4, 4, 4))]), 0)
    assert metrics["optimiser/updates"] == 3
    assert 0 <= metrics["policy/approx_kl"] < 1e-6
    assert metrics["policy/clip_fraction"] == 0


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_a_single_update_needs_no_pass_before_it(kind: str, layout: Layout) -> None:
    """[8] its own log-probabilities are the proximal ones: the same step, one pass the less."""
    results = []
    for before in (False, True):
        kl = fixed_kl(0.2, "loss")
        session = open_session(make_config(kind, STATELESS, layout, advantage=GRPO, kl=kl))
        disturb(session._reference, 0.05)
        assert session.ppo._maker.policy_pass is False
        session.ppo._maker.policy_pass = before
        forward = mock.Mock(side_effect=session._engine.forward)
        with mock.patch.object(session._engine, "forward", forward):
            metrics = session.ppo.step(off_policy(rollouts(kind)), 0)
        results.append((metrics, parameters(session), forward.call_count))
    (one, mine, passes), (other, theirs, twice) = results
    assert twice == 2 * passes
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert abs(one["kl"]) > 0.01
    assert abs(one["sampler/gap"]) > 0.5
    assert distance(mine, theirs) < 1e-5


@pytest.mark.parametrize(
    "needed",
    [
        {"epochs": 2},
        {"minibatches": 2},
        {"kl": fixed_kl(0.1)},
        {"advantage": GAE},
    ],
    ids=str,
)
def test_what_else_needs_the_policys_scores_has_them(needed: dict[str, Any]) -> None:
    settings = {"advantage": GRPO, "kl": fixed_kl(0.1, "loss"), **needed}
    assert open_session(make_config(KINDS[0], **settings)).ppo._maker.policy_pass


# ---------------------------------------------------------------- the update


def _check_step(
    kind: str, layout: Layout, advantage: dict[str, Any], **changes: Any
) -> tuple[LearnerSession, dict[str, float]]:
    """Takes one step and compares gradient norm, losses and parameters with the plain loops."""
    settings = {"entropy_coefficient": 0.01, "kl": fixed_kl(0.2), **changes}
    config = make_config(
        kind, STATELESS, layout, advantage=advantage, policy__temperature=0.8, **settings
    )
    session = open_session(config)
    policy = plain_policy(config)
    reference: Any = None
    if config.policy.lora is None:
        reference = copy.deepcopy(policy.lm)
        disturb(reference, 0.05)
        disturb(session._reference, 0.05)
    scored = off_policy(rollouts(kind))
    found = gradients(policy, loss_by_hand(policy, reference, scored, config))
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    assert distance(parameters(session), before) == 0
    expected = stateless_step(before, found)
    assert distance(expected, before) > 1e-2

    metrics = session.ppo.step(scored, 0)
    assert metrics["optimiser/updates"] == 1
    assert metrics["optimiser/grad_norm"] == pytest.approx(global_norm(found), rel=1e-4)
    assert distance(parameters(session), expected) < 2e-6
    return session, metrics


@BOTH
@EVERY_LAYOUT
def test_one_step_by_hand(kind: str, layout: Layout) -> None:
    """[22] [11] [17] [2] a whole step: token mean, score on the last token, GAE, temperature."""
    session, metrics = _check_step(kind, layout, GAE)
    assert session.shares_prompts == layout.share, "else this compares nothing"
    assert metrics.keys() >= VALUE_METRICS
    assert 0.5 < metrics["sampler/importance_weight"] < 1.5
    assert metrics["sampler/gap"] > 0.5


@BOTH
@pytest.mark.parametrize("apply_to", ["reward", "loss"])
@pytest.mark.parametrize("advantage", [RLOO, GRPO, DR_GRPO], ids=["rloo", "grpo", "dr-grpo"])
def test_one_step_with_a_group_baseline_by_hand(
    kind: str, advantage: dict[str, Any], apply_to: str
) -> None:
    """[13] [22] no critic: the whole response's KL is in its reward, or k2 is in the loss."""
    layout = Layout(2, 24, True) if apply_to == "reward" else Layout(0, 24, True)
    session, metrics = _check_step(kind, layout, advantage, kl=fixed_kl(0.2, apply_to))
    assert session.policy.critic is None
    assert len(session._engine.engine.optimizer.param_groups) == 1
    assert not metrics.keys() & VALUE_METRICS


@pytest.mark.parametrize(("kind", "gamma"), [("counting-llama", 0.9), ("counting-t5", 1.0)])
def test_one_step_of_reinforce_plus_plus_by_hand(kind: str, gamma: float) -> None:
    """[17] [18] [22] no critic; the KL penalty of the tokens still to come is in each advantage."""
    plus = {"kind": "reinforce++", "gamma": gamma}
    session, metrics = _check_step(kind, LAYOUTS[1], plus)
    assert session.policy.critic is None
    assert not metrics.keys() & VALUE_METRICS


@BOTH
@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[4]], ids=str)
def test_one_step_with_a_critic_model_by_hand(kind: str, layout: Layout) -> None:
    """[22] the value loss trains the critic alone, the policy's loss the language model alone."""
    session, metrics = _check_step(kind, layout, CRITIC, kl=fixed_kl(0.2, "loss"))
    assert metrics.keys() >= VALUE_METRICS
    names = {name.split(".")[0] for name, _ in session.policy.named_parameters()}
    assert names == {"lm", "critic"}


@pytest.mark.parametrize(
    ("kind", "layout"), [("counting-llama", LAYOUTS[4]), ("counting-t5", LAYOUTS[1])], ids=str
)
def test_one_step_of_adapters_by_hand(kind: str, layout: Layout) -> None:
    """[22] with LoRA the gradient of the adapters and of the value head, of nothing else."""
    session, metrics = _check_step(kind, layout, GAE, policy__lora=LORA)
    assert abs(metrics["kl"]) < 1e-6, "the adapters change nothing yet"
    trained = {name for name, p in session.policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("critic.") for name in trained)


@BOTH
def test_positive_advantage_raises_the_logprob(kind: str) -> None:
    """[19] a step makes the better of two responses more likely, the worse less."""
    config = make_config(
        kind,
        {"learning_rate": 1e-3},
        advantage={"kind": "gae", "value_coefficient": 0.0},
        kl=fixed_kl(0.0),
    )
    session = open_session(config)
    scored = rollouts(kind, questions=[(2, (4,)), (5, (4,))], rewards=[1.0, -1.0])

    def logprobs(lm: Any) -> list[float]:
        return [float(alone(lm, None, one.rollout).logprobs.sum().detach()) for one in scored]

    policy = plain_policy(config)
    before = logprobs(policy.lm)
    session.ppo.step(scored, 0)
    policy.load_state_dict(parameters(session), strict=False)
    after = logprobs(policy.lm)
    assert after[0] > before[0] + 1e-3
    assert after[1] < before[1] - 1e-3


# ---------------------------------------------------------------- what enters a step


def _emptied(scored: list[ScoredRollout], *which: int) -> list[ScoredRollout]:
    """Some of the responses are empty."""
    return [
        replace(one, rollout=replace(one.rollout, response_ids=(), logprobs=()))
        if index in which
        else one
        for index, one in enumerate(scored)
    ]


@pytest.mark.parametrize(
    ("advantage", "empty", "left"),
    [
        (GAE, (0, 3), (1, 2, 4, 5, 6)),
        (RLOO, (0, 3), (2, 4, 5, 6)),  # the first question is left with one rationale
        (GRPO, (2, 3, 4, 5), (0, 1)),
    ],
    ids=["gae", "rloo", "grpo"],
)
def test_what_cannot_be_learnt_from_is_dropped_and_counted(
    advantage: dict[str, Any], empty: tuple[int, ...], left: tuple[int, ...]
) -> None:
    """An empty response, and one without another to its question: as if they had not been."""
    results = []
    scored = rollouts("counting-llama")
    for batch in (_emptied(scored, *empty), [scored[index] for index in left]):
        session = open_session(make_config("counting-llama", STATELESS, advantage=advantage))
        results.append((session.ppo.step(batch, 0), parameters(session)))
    (with_dropped, one), (without, other) = results
    assert with_dropped.pop("batch/dropped") == 7 - len(left)
    assert without.pop("batch/dropped") == 0
    assert with_dropped == without
    assert distance(one, other) == 0


@pytest.mark.parametrize("advantage", [GAE, GRPO], ids=["gae", "grpo"])
def test_a_step_needs_something_to_learn_from(advantage: dict[str, Any]) -> None:
    session = open_session(make_config("counting-llama", advantage=advantage))
    everything = _emptied(rollouts("counting-llama"), *range(7))
    with pytest.raises(ValueError, match="no usable rationales: all 7 are empty"):
        session.ppo.step(everything, 0)
    alone_each = rollouts("counting-llama", questions=[(2, (3,)), (5, (4,))])
    if advantage is GAE:
        assert session.ppo.step(alone_each, 0)["batch/dropped"] == 0
    else:
        with pytest.raises(ValueError, match=r"no usable rationales: all 2 .* the only sample"):
            session.ppo.step(alone_each, 0)


def test_the_learner_trains_on_the_sampled_ids() -> None:
    """[32] token in, token out: the model sees the ids, also where their text gives others."""
    session = open_session(make_config("llama"))
    tokenizer = session._tokenizer
    letters = tuple(tokenizer.convert_tokens_to_ids(list("country")))
    text = tokenizer.decode(letters)
    assert text == "country"
    assert tuple(tokenizer(text).input_ids) != letters
    scored = rollouts("llama", questions=[(2, (7, 3))])
    rollout = replace(scored[0].rollout, response_ids=letters, text=text)
    scored[0] = replace(scored[0], rollout=rollout)
    asked = list(rollout.prompt_ids)
    other = list(scored[1].rollout.response_ids)
    seen: list[tuple[list[int], list[int]]] = []

    def spy(module: Any, arguments: Any) -> None:
        seen.append((arguments[0].ids[0].tolist(), arguments[0].targets.tolist()))

    handle = session.policy.register_forward_pre_hook(spy)
    session.ppo.step(scored, 0)
    handle.remove()
    # One row for the question; a response's last token is predicted, but not read.
    row = (asked + list(letters[:-1]) + other[:-1], [*letters, *other])
    assert seen == [row, row], "scored, then trained on"


def test_metrics_are_means_over_the_tokens_of_all_minibatches() -> None:
    """[22] of uneven minibatches too: the entropy of a policy that stands still is the batch's."""
    config = make_config("counting-llama", {"learning_rate": 1e-12}, minibatches=3)
    scored = rollouts("counting-llama")
    metrics = open_session(config).ppo.step(scored, 0)
    policy = plain_policy(config)
    with torch.no_grad():
        entropies = torch.cat([alone(policy.lm, None, o.rollout).entropies for o in scored])
    assert len(entropies) == TOKENS
    assert metrics["policy/entropy"] == pytest.approx(float(entropies.mean()), rel=1e-5)
    assert metrics["optimiser/updates"] == 3


def test_what_a_step_tells_of_its_kl_and_ratios() -> None:
    """Extremes over all tokens and passes; KL below 0."""
    config = make_config(
        "counting-llama", {"learning_rate": 3e-2}, epochs=2, policy__dtype="float32"
    )
    session = open_session(config)
    rewards = [0.5, 0.5, 0.25, 1.0, 1.0, -1.0, 1.0]
    scored = rollouts(
        "counting-llama", questions=[(3, (4, 2, 5)), (5, (4, 3)), (2, (1, 6))], rewards=rewards
    )
    metrics = session.ppo.step(scored, 0)
    assert metrics["batch/tokens"] == 4 + 2 + 5 + 4 + 3 + 1 + 6
    assert metrics["kl/negative_count"] == 0, "rounding is none"
    assert 0 < metrics["policy/ratio_min"] < 0.999 < 1.001 < metrics["policy/ratio_max"]
    found, trained = [], session.policy.lm
    base = plain_policy(config).lm
    with torch.no_grad():
        for one in scored:
            now, then = alone(trained, None, one.rollout), alone(base, None, one.rollout)
            found.append(float((now.logprobs - then.logprobs).sum()))
    again = session.ppo.step(scored, 1)
    assert again["kl/negative_count"] == sum(value < 0 for value in found) > 0
