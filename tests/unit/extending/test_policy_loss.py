"""The policy loss of docs/extending.md, as it stands there: by hand, and in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmcot.config import Config, training
from lmcot.errors import UserError
from lmcot.learner import policy_losses
from lmcot.learner.policy_losses import LossInputs
from lmcot.records import ScoredRollout
from tests.support.learner_by_hand import (
    alone,
    global_norm,
    gradients,
    plain_policy,
    stateless_step,
)
from tests.support.learner_cases import (
    LAYOUTS,
    STATELESS,
    Layout,
    distance,
    fixed_kl,
    make_config,
    off_policy,
    open_session,
    parameters,
    rollouts,
)
from tests.support.learner_seams import add_to, parse_extended
from tests.support.worked import python_blocks

KIND = "counting-llama"
PRODUCT = dict(policy_losses.POLICY_LOSSES)


@pytest.fixture(autouse=True)
def followed_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, function = python_blocks("A policy loss")
    add_to(training, settings, monkeypatch)
    add_to(policy_losses, function, monkeypatch)


def test_the_page_leaves_the_products_losses_as_they_are() -> None:
    losses = policy_losses.POLICY_LOSSES
    assert {k: v for k, v in losses.items() if k != "reinforce"} == PRODUCT


@pytest.mark.parametrize("with_ratio", [True, False])
def test_its_loss_and_gradient_by_hand(with_ratio: bool) -> None:
    """Ratio 2 and weight 1; ratio 1 and weight 0.5; ratio 1 and weight 1."""
    two = float(torch.tensor(2.0).log())
    current = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    inputs = LossInputs(
        current=current,
        proximal=torch.tensor([-1.0 - two, -2.0, -3.0]),
        behaviour=torch.tensor([-1.0 - two, -2.0 + two, -3.0]),
        importance_weight=torch.tensor([1.0, 0.5, 1.0]),
        importance_cap=2.0,
        advantages=torch.tensor([1.0, -2.0, 0.25]),
        response=torch.tensor([0, 1, 1]),
        step_tokens=6.0,
        step_responses=2,
    )
    settings = vars(training)["ReinforceLoss"](kind="reinforce", with_ratio=with_ratio)
    loss = policy_losses.POLICY_LOSSES["reinforce"](settings, inputs).loss
    weights = torch.tensor([2.0 if with_ratio else 1.0, -1.0, 0.25])
    torch.testing.assert_close(loss.detach(), -weights * current.detach())
    (found,) = torch.autograd.grad(loss.sum(), current)
    torch.testing.assert_close(found, -weights)


def test_its_settings_are_a_variant_of_the_loss() -> None:
    base = make_config(KIND)
    assert parse_extended(base, {}).refine.loss == base.refine.loss
    chosen = parse_extended(base, {"loss": {"kind": "reinforce", "aggregation": "sequence_mean"}})
    assert chosen.refine.loss.model_dump() == {
        "kind": "reinforce",
        "with_ratio": True,
        "aggregation": "sequence_mean",
        "aggregation_length": None,
    }
    with pytest.raises(UserError, match=r"unknown key 'refine\.loss\.clip'"):
        parse_extended(base, {"loss": {"kind": "reinforce", "clip": 0.1}})


def _by_hand(scored: list[ScoredRollout], config: Config, policy: Any, aggregation: str) -> Tensor:
    """Leave-one-out advantages, plain loops, all ratios 1."""
    total, tokens = torch.zeros(()), sum(len(one.rollout.response_ids) for one in scored)
    for one in scored:
        same = [
            o for o in scored if o.rollout.example_id == one.rollout.example_id and o is not one
        ]
        advantage = one.reward - sum(other.reward for other in same) / len(same)
        logprobs = alone(policy.lm, None, one.rollout).logprobs
        weights = (logprobs.detach() - torch.tensor(one.rollout.logprobs)).exp()
        terms = -advantage * weights.clamp(max=config.refine.importance_cap) * logprobs
        share = 1 / tokens if aggregation == "token_mean" else 1 / (len(scored) * len(logprobs))
        total = total + terms.sum() * share
    return total


@pytest.mark.usefixtures("one_thread", "model_cache")
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[4]], ids=str)
def test_a_step_by_hand(layout: Layout, aggregation: str) -> None:
    """However the step is cut into micro-batches, at ZeRO stages 0, 2 and 3."""
    base = make_config(KIND, STATELESS, layout, kl=fixed_kl(0.0), advantage={"kind": "rloo"})
    config = parse_extended(base, {"loss": {"kind": "reinforce", "aggregation": aggregation}})
    session, policy = open_session(config), plain_policy(base)
    scored = off_policy(rollouts(KIND))
    loss = _by_hand(scored, base, policy, aggregation)
    found = gradients(policy, loss)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}

    metrics = session.ppo.step(scored, 0)
    assert metrics["loss/policy"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert metrics["optimiser/grad_norm"] == pytest.approx(global_norm(found), rel=1e-4)
    assert "policy/clip_fraction" not in metrics
    assert distance(parameters(session), before) > 1e-2
    assert distance(parameters(session), stateless_step(before, found)) < 2e-6
