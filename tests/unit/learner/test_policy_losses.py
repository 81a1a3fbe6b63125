"""The policy's losses: by hand, their properties, and whole steps against plain loops."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmcot.config import CispoLoss, Config, GspoLoss, PpoLoss
from lmcot.config.training import Aggregation, PolicyLossSettings
from lmcot.learner import maths
from lmcot.learner.policy_losses import LossInputs, LossOutputs, policy_loss
from lmcot.records import ScoredRollout
from tests.support.learner_by_hand import alone, gradients, plain_policy, stateless_step
from tests.support.learner_cases import (
    LAYOUTS,
    QUESTIONS,
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

LLAMA, T5 = "counting-llama", "counting-t5"
CAP = 2.0
LENGTHS = (2, 1, 3)
"""Tokens of each response of the micro-batch that is worked out by hand."""


def inputs_of(
    ratios: list[float], weights: list[float], advantages: list[float], lengths: tuple[int, ...]
) -> LossInputs:
    """Tokens whose current probability is 1/2, with these ratios and untruncated weights."""
    current = torch.full((len(ratios),), math.log(0.5), dtype=torch.float64, requires_grad=True)
    proximal = current.detach() - torch.tensor(ratios, dtype=torch.float64).log()
    raw = torch.tensor(weights, dtype=torch.float64)
    return LossInputs(
        current=current,
        proximal=proximal,
        behaviour=proximal - raw.log(),
        importance_weight=raw.clamp_max(CAP),
        importance_cap=CAP,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        response=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        step_tokens=float(len(ratios)),
        step_responses=len(lengths),
    )


def told(loss: PolicyLossSettings, inputs: LossInputs) -> tuple[LossOutputs, list[float]]:
    """What a loss gives, and its gradient summed over the tokens."""
    found = policy_loss(loss, inputs)
    (gradient,) = torch.autograd.grad(found.loss.sum(), inputs.current)
    return found, gradient.tolist()


def shares(found: LossOutputs, side: str) -> list[float]:
    return found.metrics[f"policy/clip_fraction{side}"].tolist()


# ---------------------------------------------------------------- by hand


def test_ppo_with_other_bounds_above_and_below_by_hand() -> None:
    """[19] 1 - 0.2 .. 1 + 0.5: a ratio of 1.4 is within, 1.6 is not, nor is 0.7."""
    loss = PpoLoss(clip_low=0.2, clip_high=0.5)
    inputs = inputs_of(
        ratios=[1.4, 1.6, 0.7, 0.7, 1.6, 0.9],
        weights=[1.0, 1.0, 0.5, 1.0, 4.0, 1.0],
        advantages=[2.0, 2.0, -1.0, 1.0, -1.0, -1.0],
        lengths=LENGTHS,
    )
    found, gradient = told(loss, inputs)
    # The last weight but one, 4, is truncated at 2.
    assert found.loss.tolist() == pytest.approx([-2.8, -3.0, 0.5 * 0.8, -0.7, 2 * 1.6, 0.9])
    assert gradient == pytest.approx([-2.8, 0, 0, -0.7, 2 * 1.6, 0.9])
    assert shares(found, "") == [0, 1, 1, 0, 0, 0]
    assert shares(found, "_low") == [0, 0, 1, 0, 0, 0]
    assert shares(found, "_high") == [0, 1, 0, 0, 0, 0]
    assert "policy/dual_clip_fraction" not in found.metrics


def test_one_clip_holds_for_both_sides_unless_one_is_set() -> None:
    assert PpoLoss(clip=0.3).bounds == (0.3, 0.3)
    assert PpoLoss(clip=0.3, clip_high=0.4).bounds == (0.3, 0.4)
    assert PpoLoss(clip_low=0.1).bounds == (0.1, 0.2)


def test_the_dual_clip_is_before_the_importance_weight() -> None:
    """[19] ratio 5, advantage -1: the bound 3, times the weight 0.5."""
    inputs = inputs_of([5.0, 2.0], [0.5, 0.5], [-1.0, -1.0], (2,))
    found, gradient = told(PpoLoss(clip_high=0.5, dual_clip=3.0), inputs)
    assert found.loss.tolist() == pytest.approx([1.5, 1.0])
    assert gradient == pytest.approx([0, 1.0])
    assert found.metrics["policy/dual_clip_fraction"].tolist() == [1, 0]


def test_gspo_by_hand() -> None:
    """[19] sequence ratios sqrt(1.21 x 1) = 1.1, 0.5, and 8^(1/3) = 2."""
    loss = GspoLoss(kind="gspo", clip_low=0.2, clip_high=0.3)
    inputs = inputs_of(
        ratios=[1.21, 1.0, 0.5, 8.0, 1.0, 1.0],
        weights=[4.0, 1.0, 1.0, 27.0, 1.0, 8.0],
        advantages=[2.0, 2.0, -1.0, 0.5, 0.5, 0.5],
        lengths=LENGTHS,
    )
    found, gradient = told(loss, inputs)
    # Weights sqrt(4) = 2, 1, and 216^(1/3) = 6, which is truncated at 2.
    assert found.loss.tolist() == pytest.approx([-2 * 2 * 1.1] * 2 + [0.8] + [-2 * 0.5 * 1.3] * 3)
    # Of the first response: 2 tokens with this loss each, whose ratio each of them moves by half.
    assert gradient == pytest.approx([-4.4, -4.4, 0, 0, 0, 0])
    assert shares(found, "_low") == [0, 0, 1, 0, 0, 0]
    assert shares(found, "_high") == [0, 0, 0, 1, 1, 1]


def test_cispo_by_hand() -> None:
    """[19] no token loses its gradient: ratios of 3 and 0.5 count as 1.5 and 0.9."""
    inputs = inputs_of(
        ratios=[3.0, 3.0, 0.5, 1.2, 1.0, 1.0],
        weights=[1.0, 1.0, 0.5, 4.0, 1.0, 1.0],
        advantages=[1.0, -2.0, 1.0, 1.0, 0.0, 1.0],
        lengths=LENGTHS,
    )
    found, gradient = told(CispoLoss(kind="cispo", clip_low=0.1, clip_high=0.5), inputs)
    expected = [-1.5, 3.0, -0.45, -2.4, 0.0, -1.0]
    assert gradient == pytest.approx(expected)
    assert found.loss.tolist() == pytest.approx([g * math.log(0.5) for g in expected])
    assert shares(found, "_low") == [0, 0, 1, 0, 0, 0]
    assert shares(found, "_high") == [1, 1, 0, 0, 0, 0]
    without, gradient = told(CispoLoss(kind="cispo", clip_high=0.5), inputs)
    assert gradient[2] == pytest.approx(-0.25), "no lower bound unless it is set"
    assert shares(without, "_low") == [0] * 6


def test_aggregations_by_hand() -> None:
    """[22] responses of 2, 1 and 3 tokens, of 12 tokens and 4 responses in the step."""
    inputs = replace(
        inputs_of([1.0] * 6, [1.0] * 6, [1.0] * 6, LENGTHS), step_tokens=12.0, step_responses=4
    )
    expected: dict[Aggregation, list[float]] = {
        "token_mean": [1.0] * 6,
        "sequence_mean": [12 / (4 * n) for n in LENGTHS for _ in range(n)],
        "constant": [12 / (4 * 5)] * 6,
    }
    for aggregation, scale in expected.items():
        loss = PpoLoss(aggregation=aggregation)
        assert inputs.token_scale(loss, max_length=5).tolist() == pytest.approx(scale)
    own = PpoLoss(aggregation="constant", aggregation_length=8)
    assert inputs.token_scale(own, max_length=5).tolist() == pytest.approx([12 / (4 * 8)] * 6)


# ---------------------------------------------------------------- properties

LOSSES: tuple[PolicyLossSettings, ...] = (
    PpoLoss(),
    PpoLoss(clip_low=0.1, clip_high=0.4, dual_clip=2.0),
    GspoLoss(kind="gspo"),
    GspoLoss(kind="gspo", clip_low=0.2, clip_high=0.4),
    CispoLoss(kind="cispo"),
    CispoLoss(kind="cispo", clip_low=0.2, clip_high=0.2),
)
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def drawn(seed: int, lengths: tuple[int, ...], *, on_policy: bool = False) -> LossInputs:
    """Random responses, each with one advantage."""
    generator, number = random.Random(seed), sum(lengths)
    ratios = [1.0 if on_policy else generator.lognormvariate(0, 0.4) for _ in range(number)]
    weights = [generator.lognormvariate(0, 0.5) for _ in range(number)]
    advantages = [one for n in lengths for one in [generator.gauss(0, 1)] * n]
    return inputs_of(ratios, weights, advantages, lengths)


some_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple)


@given(st.sampled_from(LOSSES), st.integers(0, 10**6), some_lengths)
def test_before_the_policy_moves_all_losses_have_the_score_functions_gradient(
    loss: PolicyLossSettings, seed: int, lengths: tuple[int, ...]
) -> None:
    """[8] -A w at each token: w is the token's weight, for GSPO the response's."""
    inputs = drawn(seed, lengths, on_policy=True)
    found, gradient = told(loss, inputs)
    weight = inputs.importance_weight
    if isinstance(loss, GspoLoss):
        logs = inputs.response_mean(inputs.proximal - inputs.behaviour)
        weight = logs.exp().clamp_max(CAP)
    assert gradient == pytest.approx((-inputs.advantages * weight).tolist())
    assert not any(metric.any() for metric in found.metrics.values()), "nothing is clipped"


@given(st.sampled_from(LOSSES), st.integers(0, 10**6), some_lengths)
def test_without_an_advantage_there_is_no_gradient(
    loss: PolicyLossSettings, seed: int, lengths: tuple[int, ...]
) -> None:
    """On which the spared backward passes rest."""
    assert loss.follows_advantages_only
    inputs = drawn(seed, lengths)
    nothing = replace(inputs, advantages=torch.zeros_like(inputs.advantages))
    assert not any(told(loss, nothing)[1])


@given(
    st.sampled_from(LOSSES),
    st.sampled_from(AGGREGATIONS),
    st.integers(0, 10**6),
    st.lists(st.integers(1, 6), min_size=2, max_size=6),
    st.data(),
)
def test_the_loss_does_not_depend_on_how_a_step_is_cut(
    loss: PolicyLossSettings, aggregation: str, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    """[22] two micro-batches add up to the one that holds both, in another order too."""
    loss = loss.model_copy(update={"aggregation": aggregation})
    whole = drawn(seed, tuple(lengths))
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(1, len(lengths) - 1))

    def summed(inputs: LossInputs) -> Tensor:
        scale = inputs.token_scale(loss, max_length=7)
        return (policy_loss(loss, inputs).loss * scale).sum() / whole.step_tokens

    parts = torch.zeros((), dtype=torch.float64)
    for members in (order[:cut], order[cut:]):
        where = torch.cat([(whole.response == one).nonzero()[:, 0] for one in members])
        sizes = torch.tensor([lengths[one] for one in members])
        part = replace(
            whole,
            **{
                name: getattr(whole, name)[where]
                for name in ("current", "proximal", "behaviour", "importance_weight", "advantages")
            },
            response=torch.arange(len(members)).repeat_interleave(sizes),
        )
        parts = parts + summed(part)
    one = summed(whole)
    torch.testing.assert_close(parts, one)
    torch.testing.assert_close(
        torch.autograd.grad(parts, whole.current), torch.autograd.grad(one, whole.current)
    )
    # As the definition says, response by response.
    tokens = policy_loss(loss, whole).loss.detach().split(lengths)
    means = {
        "token_mean": sum(float(t.sum()) for t in tokens) / sum(lengths),
        "sequence_mean": sum(float(t.mean()) for t in tokens) / len(lengths),
        "constant": sum(float(t.sum()) for t in tokens) / 7 / len(lengths),
    }
    assert one.item() == pytest.approx(means[aggregation])


@given(st.sampled_from(LOSSES), st.integers(0, 10**6))
def test_extreme_ratios_stay_finite(loss: PolicyLossSettings, seed: int) -> None:
    """[21] the log-ratio is clamped before the exponential."""
    generator = random.Random(seed)
    current = torch.tensor([generator.choice([0.0, -1e4, -1e30]) for _ in range(6)])
    proximal = torch.tensor([generator.choice([0.0, -1e4, -1e30]) for _ in range(6)])
    for sign in (1.0, -1.0):
        inputs = replace(
            drawn(seed, LENGTHS),
            current=current.requires_grad_(),
            proximal=proximal,
            behaviour=proximal,
            importance_weight=torch.ones(6),
            advantages=torch.full((6,), sign),
        )
        found, gradient = told(loss, inputs)
        assert all(map(math.isfinite, [*found.loss.tolist(), *gradient]))


# ---------------------------------------------------------------- whole steps


def _plain_step(
    scored: list[ScoredRollout], config: Config, policy: Any, proximal: list[Tensor]
) -> dict[str, Tensor]:
    """The gradient of one update, response by response, with the papers' formulas.

    Advantages: a reward less its question's mean; no KL and no entropy bonus.
    """
    loss, cap = config.refine.loss, config.refine.importance_cap
    assert isinstance(loss, PpoLoss | GspoLoss | CispoLoss)
    sums, lengths, total = [], [len(one.rollout.response_ids) for one in scored], torch.zeros(())
    for one, old in zip(scored, proximal, strict=True):
        same = [o.reward for o in scored if o.rollout.example_id == one.rollout.example_id]
        advantage = one.reward - sum(same) / len(same)
        logs = alone(policy.lm, None, one.rollout).logprobs
        weight = (old - torch.tensor(one.rollout.logprobs)).exp().clamp(max=cap)
        ratio = (logs - old).exp()
        if isinstance(loss, CispoLoss):
            least = 1 - (loss.clip_low or 1.0)
            clipped = ratio.detach().clamp(least, 1 + loss.clip_high)
            terms = -clipped * advantage * logs * weight
        else:
            low, high = (
                loss.bounds if isinstance(loss, PpoLoss) else (loss.clip_low, loss.clip_high)
            )
            if isinstance(loss, GspoLoss):
                ratio = ratio.prod().pow(1 / len(logs)).expand(len(logs))
                product = (old - torch.tensor(one.rollout.logprobs)).sum().exp()
                weight = product.pow(1 / len(logs)).clamp(max=cap)
            clipped = ratio.clamp(1 - low, 1 + high)
            terms = -torch.minimum(ratio * advantage, clipped * advantage) * weight
        sums.append(terms.sum())
    for part, length in zip(sums, lengths, strict=True):
        match loss.aggregation:
            case "token_mean":
                total = total + part / sum(lengths)
            case "sequence_mean":
                total = total + part / length / len(lengths)
            case "constant":
                constant = loss.aggregation_length or config.policy.max_new_tokens
                total = total + part / constant / len(lengths)
    return gradients(policy, total)


def _by_hand(
    scored: list[ScoredRollout], config: Config, policy: Any, epochs: int
) -> list[dict[str, Tensor]]:
    """The parameters before the step and after each of its updates."""
    with torch.no_grad():
        proximal = [alone(policy.lm, None, one.rollout).logprobs for one in scored]
    found = [{name: p.detach().clone() for name, p in policy.named_parameters()}]
    for _ in range(epochs):
        found.append(stateless_step(found[-1], _plain_step(scored, config, policy, proximal)))
        policy.load_state_dict(found[-1], strict=False)
    return found


DR_GRPO = {"kind": "grpo", "normalise": False}
ASYMMETRIC = {"kind": "ppo", "clip_low": 0.03, "clip_high": 0.08}
SEQUENCE_MEAN = {"kind": "ppo", "aggregation": "sequence_mean"}
CONSTANT = {"kind": "ppo", "aggregation": "constant", "aggregation_length": 16}
GSPO = {"kind": "gspo", "clip_low": 0.02, "clip_high": 0.05}
GSPO_BY_TOKENS = {"kind": "gspo", "aggregation": "token_mean"}
CISPO = {"kind": "cispo", "clip_low": 0.05, "clip_high": 0.1}
CISPO_BY_MAX_NEW_TOKENS = {"kind": "cispo", "aggregation": "constant"}


@pytest.mark.usefixtures("one_thread", "model_cache")
@pytest.mark.parametrize(
    ("kind", "layout", "loss"),
    [
        *(
            (LLAMA, LAYOUTS[1], loss)
            for loss in (ASYMMETRIC, SEQUENCE_MEAN, CONSTANT, GSPO, GSPO_BY_TOKENS, CISPO)
        ),
        (LLAMA, LAYOUTS[0], GSPO),
        (LLAMA, LAYOUTS[4], SEQUENCE_MEAN),
        (LLAMA, LAYOUTS[4], GSPO),
        (T5, LAYOUTS[3], GSPO),
        (T5, LAYOUTS[1], SEQUENCE_MEAN),
        (T5, LAYOUTS[3], CISPO_BY_MAX_NEW_TOKENS),
    ],
    ids=str,
)
def test_updates_by_hand(kind: str, layout: Layout, loss: dict[str, Any]) -> None:
    """[22] three updates on one batch, off policy: every micro-batching gives the plain loop's."""
    config = make_config(
        kind,
        STATELESS,
        layout,
        advantage=DR_GRPO,
        kl=fixed_kl(0.0),
        loss=loss,
        epochs=3,
        policy__max_new_tokens=8,
    )
    session, scored = open_session(config), off_policy(rollouts(kind))
    assert session.shares_prompts == layout.share
    expected = _by_hand(scored, config, plain_policy(config), epochs=3)
    assert distance(parameters(session), expected[0]) == 0
    metrics = session.ppo.step(scored, 0)
    assert metrics["optimiser/updates"] == 3
    assert distance(expected[0], expected[-1]) > 2e-3
    assert distance(parameters(session), expected[-1]) < 1e-5
    low, high = metrics["policy/clip_fraction_low"], metrics["policy/clip_fraction_high"]
    assert metrics["policy/clip_fraction"] == pytest.approx(low + high)
    if "clip_low" in loss:
        assert low > 0 or high > 0, "or the bounds are not tested"


# ---------------------------------------------------------------- spared backward passes

REWARDS = [1.0, 1.0, 0.5, 0.0, 0.5, -1.0, -1.0]
"""The first and the last question's rationales all have one reward."""
NO_KL = {"advantage": {"kind": "grpo"}, "kl": fixed_kl(0.0, "loss")}


@pytest.mark.usefixtures("one_thread", "model_cache")
@pytest.mark.parametrize(
    ("kind", "layout", "loss"),
    [
        (LLAMA, LAYOUTS[1], {"kind": "ppo"}),
        (LLAMA, LAYOUTS[4], {"kind": "gspo"}),
        (T5, LAYOUTS[3], {"kind": "cispo", "aggregation": "constant"}),
    ],
    ids=str,
)
def test_what_has_no_gradient_is_spared_its_backward_pass(
    kind: str, layout: Layout, loss: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """[31] two steps with Adam's momentum, the second without any advantage: the same trajectory.

    All metrics cover all tokens, as if nothing were spared.
    """
    adam = {"learning_rate": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    results = []
    for spare in (True, False):
        config = make_config(kind, adam, layout, **NO_KL, loss=loss, epochs=2, target_kl=1e3)
        session = open_session(config)
        if not spare:
            monkeypatch.setattr(session.ppo._objective, "follows_advantages_only", lambda _: False)
        backward = mock.Mock(side_effect=session._engine.backward)
        metrics = []
        with mock.patch.object(session._engine, "backward", backward):
            for step, rewards in enumerate((REWARDS, [0.25] * 7)):
                scored = off_policy(rollouts(kind, seed=step, rewards=rewards))
                metrics.append(session.ppo.step(scored, step))
        results.append((metrics, parameters(session), backward.call_count))
    (spared, mine, few), (full, theirs, many) = results
    assert few < many
    assert distance(mine, theirs) < 1e-6
    tokens = sum(length for _, lengths in QUESTIONS for length in lengths)
    without = sum(QUESTIONS[0][1]) + sum(QUESTIONS[2][1])
    assert spared[0]["batch/no_backward"] == pytest.approx(without / tokens)
    assert 0.5 < spared[1]["batch/no_backward"] < 1, "one rationale remains"
    for one, other in zip(spared, full, strict=True):
        assert other.pop("batch/no_backward") == 0
        assert one.pop("batch/no_backward") > 0
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert full[1]["optimiser/grad_norm"] == 0
    assert full[1]["policy/approx_kl"] > 0, "the momentum moves the policy"


@pytest.mark.usefixtures("one_thread", "model_cache")
@pytest.mark.parametrize(
    "changes",
    [
        {"entropy_coefficient": 0.01},
        {"kl": fixed_kl(0.1, "loss")},
        {"advantage": {"kind": "gae"}},
    ],
    ids=str,
)
def test_nothing_is_spared_where_something_else_learns_from_it(changes: dict[str, Any]) -> None:
    config = make_config(LLAMA, STATELESS, **{**NO_KL, **changes})
    metrics = open_session(config).ppo.step(rollouts(LLAMA, rewards=REWARDS), 0)
    assert metrics["batch/no_backward"] == 0


# ---------------------------------------------------------------- the sampler's weights


def test_effective_sample_size_by_hand() -> None:
    """Of weights 1, 1, 2: 16 / (3 x 6); padding does not count."""
    weights, mask = torch.tensor([[1.0, 1.0], [2.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert float(maths.effective_sample_size(weights, mask)) == pytest.approx(16 / 18)
    assert float(maths.effective_sample_size(torch.full((2, 2), 0.5), mask)) == pytest.approx(1)


@given(st.lists(st.floats(1e-3, 100), min_size=1, max_size=20))
def test_effective_sample_size_is_a_share(values: list[float]) -> None:
    weights = torch.tensor([values], dtype=torch.float64)
    share = float(maths.effective_sample_size(weights, torch.ones_like(weights)))
    assert 1 / len(values) - 1e-9 <= share <= 1 + 1e-9


@pytest.mark.usefixtures("one_thread", "model_cache")
def test_a_step_tells_of_its_importance_weights() -> None:
    """Weights e^1 (truncated at 2) and e^-0.7 in turn."""
    scored = [
        replace(
            one,
            rollout=replace(
                one.rollout,
                logprobs=tuple(
                    p + (0.7 if t % 2 else -1.0) for t, p in enumerate(one.rollout.logprobs)
                ),
            ),
        )
        for one in rollouts(LLAMA, questions=[(3, (4, 2))])
    ]
    config = make_config(LLAMA, STATELESS, advantage=DR_GRPO)
    metrics = open_session(config).ppo.step(scored, 0)
    low = math.exp(-0.7)
    assert metrics["sampler/capped_share"] == 0.5
    assert metrics["sampler/importance_weight"] == pytest.approx((2 + low) / 2, rel=1e-5)
    expected = (2 + low) ** 2 / (2 * (4 + low**2))
    assert metrics["sampler/effective_sample_size"] == pytest.approx(expected, rel=1e-5)
