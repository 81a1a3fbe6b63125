"""PPO's arithmetic, against numbers worked out by hand and brute force."""

from __future__ import annotations

import math
import random
import statistics
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmcot.config import ReinforcePlusPlus
from lmcot.learner import advantages as estimators
from lmcot.learner import maths
from lmcot.learner.advantages import AdvantageInputs
from lmcot.learner.vocabulary import token_entropy, token_logprobs

P = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
Q = torch.tensor([0.20, 0.20, 0.20, 0.20, 0.20], dtype=torch.float64)


def test_token_logprobs_equal_a_hand_loop_at_any_temperature() -> None:
    """[2] logits are divided by the temperature, then log-softmax, then the token's entry."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator) * 3
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    for temperature in (1.0, 0.7, 2.5):
        result = token_logprobs(logits, ids, temperature)
        for b in range(2):
            for t in range(3):
                weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
                expected = math.log(weights[int(ids[b, t])] / sum(weights))
                assert result[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_token_logprobs_are_float32_whatever_the_logits_are() -> None:
    logits = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.tensor([[3, 6]])
    result = token_logprobs(logits, ids)
    assert result.dtype == torch.float32
    assert torch.equal(result, token_logprobs(logits.float(), ids))


def test_entropy_of_known_distributions() -> None:
    uniform, sure, two = [0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [0.0, 0.0, -80.0, -80.0]
    logits = torch.tensor([[uniform, sure, two]])
    entropy = token_entropy(logits)
    torch.testing.assert_close(entropy, torch.tensor([[math.log(4), 0.0, math.log(2)]]))
    biased = torch.tensor([[[math.log(0.9), math.log(0.1)]]])
    expected = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert token_entropy(biased).item() == pytest.approx(expected, abs=1e-6)
    # At temperature 2 probabilities go with the square root: 3 to 1.
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert token_entropy(biased, 2.0).item() == pytest.approx(expected, abs=1e-6)


def test_entropy_bonus_raises_entropy() -> None:
    """[23] a gradient step on minus entropy raises it."""
    logits = torch.tensor([[[2.0, 0.0, -1.0]]], requires_grad=True)
    before = token_entropy(logits)
    (-before.sum()).backward()
    assert logits.grad is not None
    after = token_entropy(logits.detach() - 0.1 * logits.grad)
    assert after.item() > before.item() + 1e-3


def test_masked_mean_counts_masked_positions_only() -> None:
    values = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert maths.masked_mean(values, mask).item() == 3.0
    assert maths.masked_mean(values, torch.zeros_like(mask)).item() == 0.0


def test_score_lands_on_the_last_valid_token() -> None:
    """[11] the score lands on the last valid token; the KL penalty is per token."""
    kl = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [1.0, -1.0, 0.5]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    rewards = maths.token_rewards(torch.tensor([10.0, 20.0, -5.0]), kl, mask, 0.5)
    expected = torch.tensor([[-0.5, 9.0, 0.0], [18.0, 0.0, 0.0], [-0.5, 0.5, -5.25]])
    assert torch.equal(rewards, expected)
    assert kl[0, 2] == 9.0, "the argument itself must stay as it was"


def test_kl_estimators_against_the_analytic_kl() -> None:
    """[13] Monte Carlo means of k1, k2, k3 against the analytic KL of two categoricals."""
    samples = torch.multinomial(
        P, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    log_p, log_q = P.log()[samples], Q.log()[samples]
    analytic = float((P * (P / Q).log()).sum())
    biased = float((P * (P / Q).log().square() / 2).sum())
    cases = [
        (maths.kl_k1(log_p, log_q), analytic),
        (maths.kl_k2(log_p, log_q), biased),
        (maths.kl_k3(log_p, log_q), analytic),
    ]
    for estimate, expected in cases:
        standard_error = float(estimate.std()) / math.sqrt(len(samples))
        assert abs(float(estimate.mean()) - expected) < 4 * standard_error
    assert float(maths.kl_k3(log_p, log_q).var()) < float(maths.kl_k1(log_p, log_q).var())
    assert float(maths.kl_k1(log_p, log_q).min()) < 0


def test_k2_approaches_the_kl_of_close_distributions() -> None:
    """[13] k2's bias is of third order: a thousandth of the KL for nearby distributions."""
    close = Q * (1 + 0.01 * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64))
    analytic = float((close * (close / Q).log()).sum())
    k2 = float((close * maths.kl_k2(close.log(), Q.log())).sum())
    assert k2 == pytest.approx(analytic, rel=1e-3)


@given(st.lists(st.floats(-40, 0), min_size=1, max_size=20), st.floats(-1, 1), st.integers(0, 9))
def test_k3_is_never_negative(logprobs: list[float], difference: float, power: int) -> None:
    """[13] k3 >= 0, in float32 too and for the smallest differences."""
    policy = torch.tensor(logprobs)
    reference = policy + difference * 10.0**-power
    assert float(maths.kl_k3(policy, reference).min()) >= 0


def test_k3_of_tiny_differences() -> None:
    """[13] k3 of a log-ratio that float32 loses beside 1 is not negative, and not noise."""
    ratios = torch.tensor([1e-8, -1e-8, 3e-8, -4e-8, 1e-4, -1e-4])
    result = maths.kl_k3(torch.zeros(6), ratios)
    assert float(result.min()) >= 0
    assert float(result.max()) < 1e-8


def _gradient_in_expectation(estimator: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to the policy's logits: of the estimator, of KL(p || q), of KL(q || p)."""
    logits = P.log().clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    log_q = Q.log()
    estimate = (P * getattr(maths, estimator)(log_p, log_q)).sum()  # samples drawn from P
    forward = (log_p.exp() * (log_p - log_q)).sum()
    backward = (Q * (log_q - log_p)).sum()
    return tuple(  # type: ignore[return-value]
        torch.autograd.grad(value, logits, retain_graph=True)[0]
        for value in (estimate, forward, backward)
    )


def test_gradients_of_the_kl_estimators() -> None:
    """[13] as a loss: k2's gradient is the KL's, k1's is nothing, k3's is the other KL's."""
    estimate, forward, backward = _gradient_in_expectation("kl_k2")
    torch.testing.assert_close(estimate, forward)
    assert float(forward.abs().max()) > 0.05
    torch.testing.assert_close(_gradient_in_expectation("kl_k1")[0], torch.zeros_like(estimate))
    torch.testing.assert_close(_gradient_in_expectation("kl_k3")[0], backward)


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    padding=st.integers(0, 3),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60)
def test_gae_equals_a_double_sum(
    lengths: list[int], padding: int, gamma: float, lam: float, seed: int
) -> None:
    """[17] GAE is the double sum of discounted TD errors; what stands in the padding is ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + padding)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[float(t < length) for t in range(shape[1])] for length in lengths])
    advantages, returns = maths.gae(rewards, values, mask.double(), gamma, lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), 0.0]
        r = rewards[row, :length].tolist()
        for t in range(shape[1]):
            if t >= length:
                assert advantages[row, t] == returns[row, t] == 0
                continue
            expected = sum(
                (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
                for k in range(t, length)
            )
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-9)
            assert float(returns[row, t]) == pytest.approx(expected + v[t], abs=1e-9)


def test_gae_at_its_two_ends() -> None:
    """[17] lambda 1: discounted reward-to-go minus value; lambda 0: the TD error."""
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[0.5, 1.0, 3.0]])
    mask = torch.ones(1, 3)
    advantages, returns = maths.gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert returns.tolist() == [[3.0, 4.0, 4.0]]
    assert advantages.tolist() == [[2.5, 3.0, 1.0]]
    advantages, returns = maths.gae(rewards, values, mask, gamma=0.5, lam=0.0)
    assert advantages.tolist() == [[1.0, 2.5, 1.0]]
    assert returns.tolist() == [[1.5, 3.5, 4.0]]


def test_whiten_is_masked() -> None:
    """[18] masked whitening by hand: mean 4, variance 5; advantages lose the mean, rewards keep."""
    values = torch.tensor([[1.0, 3.0, 1e6], [5.0, 7.0, -1e6]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    root = math.sqrt(5)
    lost = torch.tensor([[-3 / root, -1 / root, 0.0], [1 / root, 3 / root, 0.0]])
    torch.testing.assert_close(maths.whiten(values, mask), lost)
    kept = (lost + 4) * mask
    torch.testing.assert_close(maths.whiten(values, mask, keep_mean=True), kept)
    assert maths.masked_mean(kept, mask).item() == pytest.approx(4)


def test_whiten_of_equal_values_stays_finite() -> None:
    """[18] no variance: zeros, or the mean where it is kept."""
    values = torch.full((1, 3), 2.0)
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert maths.whiten(values, mask).tolist() == [[0.0, 0.0, 0.0]]
    assert maths.whiten(values, mask, keep_mean=True).tolist() == [[2.0, 2.0, 0.0]]


def test_rloo_by_hand() -> None:
    """[17] leave-one-out: a reward less the mean of the others of its group."""
    rewards = torch.tensor([1.0, 5.0, 4.0, 2.0, 1.0, 0.5, -0.5])
    groups = torch.tensor([2, 0, 2, 0, 2, 1, 1])
    # Group 2: 1 - (4 + 1) / 2, 4 - (1 + 1) / 2, 1 - (1 + 4) / 2; group 0: 5 - 2, 2 - 5.
    expected = [-1.5, 3.0, 3.0, -3.0, -1.5, 1.0, -1.0]
    assert maths.rloo(rewards, groups).tolist() == expected


def test_grpo_by_hand() -> None:
    """[17] group-relative: less the group's mean, over the sample's standard deviation."""
    rewards = torch.tensor([1.0, 5.0, 4.0, 2.0, 1.0, 0.5, -0.5])
    groups = torch.tensor([2, 0, 2, 0, 2, 1, 1])
    # Means 2, 3.5, 0; squares 1 + 4 + 1 over 2: sqrt(3); 2 x 2.25 over 1; 2 x 0.25 over 1.
    centred = [-1.0, 1.5, 2.0, -1.5, -1.0, 0.5, -0.5]
    deviations = [3**0.5, 4.5**0.5, 3**0.5, 4.5**0.5, 3**0.5, 0.5**0.5, 0.5**0.5]
    expected = torch.tensor([c / d for c, d in zip(centred, deviations, strict=True)])
    torch.testing.assert_close(maths.grpo(rewards, groups), expected, atol=3e-6, rtol=0)
    assert maths.grpo(rewards, groups, normalise=False).tolist() == centred


@given(
    st.floats(-10, 10, width=32),
    st.lists(st.integers(2, 16), min_size=1, max_size=4),
    st.booleans(),
)
def test_equal_rewards_have_no_advantage(reward: float, sizes: list[int], normalise: bool) -> None:
    """[17] to the bit: a rounding error, divided by its own deviation, would be as large as 1/2."""
    groups = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    rewards = torch.full((len(groups),), reward)
    nothing = [0.0] * len(groups)
    assert maths.rloo(rewards, groups).tolist() == nothing
    assert maths.grpo(rewards, groups, normalise=normalise).tolist() == nothing
    # Another group that does differ changes nothing here.
    rewards = torch.cat([rewards, torch.tensor([1.0, 2.0])])
    groups = torch.cat([groups, torch.tensor([len(sizes)] * 2)])
    assert maths.grpo(rewards, groups, normalise=normalise)[:-2].tolist() == nothing


@given(
    st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 3)), min_size=1, max_size=16),
    st.randoms(use_true_random=False),
)
def test_group_baselines_do_not_depend_on_the_order(
    scored: list[tuple[float, int]], shuffler: random.Random
) -> None:
    """[17] of the rationales, or of the questions' numbers; a group's advantages add up to 0."""
    scored = scored + [(reward / 2, group) for reward, group in scored]  # at least two each
    order = list(range(len(scored)))
    shuffler.shuffle(order)
    names = [3, 0, 2, 1]
    rewards = torch.tensor([reward for reward, _ in scored])
    groups = torch.tensor([group for _, group in scored])
    if len(scored) < 4:
        groups, names = torch.zeros_like(groups), [0]  # group numbers are below B
    turned = torch.tensor([names[group] for group in groups.tolist()])[order]
    for estimate in (maths.rloo, maths.grpo, partial(maths.grpo, normalise=False)):
        advantages = estimate(rewards, groups)
        assert advantages.dtype == torch.float32
        torch.testing.assert_close(
            estimate(rewards[order], turned), advantages[order], atol=1e-5, rtol=1e-5
        )
        for group in set(groups.tolist()):
            assert float(advantages[groups == group].sum()) == pytest.approx(0, abs=1e-4)


def test_rloo_is_grpos_numerator_in_another_measure() -> None:
    """[17] n / (n - 1) times a reward less its group's mean: groups of 2 and 3."""
    rewards = torch.tensor([0.5, 2.0, 1.0, -3.0, 0.25])
    groups = torch.tensor([0, 1, 0, 1, 1])
    centred = maths.grpo(rewards, groups, normalise=False)
    factor = torch.tensor([2.0, 1.5, 2.0, 1.5, 1.5])
    torch.testing.assert_close(maths.rloo(rewards, groups), centred * factor)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "active"),
    [
        (1.5, 2.0, -2.4, True),
        (0.5, 2.0, -1.0, False),
        (1.5, -2.0, 3.0, False),
        (0.5, -2.0, 1.6, True),
        (1.1, 2.0, -2.2, False),
        (0.9, -2.0, 1.8, False),
    ],
)
def test_ppo_clip_in_four_quadrants(
    ratio: float, advantage: float, loss: float, active: bool
) -> None:
    """[19] the larger of the two losses; no gradient where the clip is active."""
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    proximal = torch.tensor([[-1.0]])
    ratios = maths.log_ratio(logprobs, proximal).exp()
    result = maths.clipped_loss(ratios, torch.tensor([[advantage]]), 0.2, 0.2)
    assert result.loss.item() == pytest.approx(loss, abs=1e-5)
    assert result.low.item() == float(active and ratio < 1)
    assert result.high.item() == float(active and ratio > 1)
    assert result.dual.item() == 0
    result.loss.sum().backward()
    assert logprobs.grad is not None
    expected = 0.0 if active else -advantage * ratio
    assert logprobs.grad.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves", "bounded"),
    [
        (5.0, -2.0, 6.0, False, True),  # bounded: 3 * 2 instead of 5 * 2
        (2.0, -2.0, 4.0, True, False),  # below the bound
        (0.5, -2.0, 1.6, False, False),  # PPO's own clip
        (5.0, 2.0, -2.4, False, False),  # a positive advantage knows no dual clip
        (0.1, 2.0, -0.2, True, False),
    ],
)
def test_dual_clip(ratio: float, advantage: float, loss: float, moves: bool, bounded: bool) -> None:
    """[19] dual clip: the loss for a negative advantage A is at most -c A."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    result = maths.clipped_loss(
        logprobs.exp(), torch.tensor([[advantage]]), 0.2, 0.2, dual_clip=3.0
    )
    assert result.loss.item() == pytest.approx(loss, abs=1e-5)
    assert result.dual.item() == float(bounded)
    result.loss.sum().backward()
    assert logprobs.grad is not None
    assert (logprobs.grad.item() != 0) == moves


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.0, 0.0, 1.0, 0.32, 0.0),  # right, but too far from the old value: (0.2 - 1)^2 / 2
        (0.1, 0.0, 1.0, 0.405, -0.9),  # inside the clip: (0.1 - 1)^2 / 2
        (-1.0, 0.0, 1.0, 2.0, -2.0),  # moved the wrong way: the unclipped error is the larger
        (2.0, 1.5, 1.6, 0.08, 0.4),  # overshot: (2 - 1.6)^2 / 2 against (1.7 - 1.6)^2 / 2
    ],
)
def test_value_clip(value: float, old: float, target: float, loss: float, gradient: float) -> None:
    """[20] value clip around the old values, the larger of the two, factor one half."""
    values = torch.tensor([[value]], requires_grad=True)
    result = maths.value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]), 0.2)
    assert result.item() == pytest.approx(loss, abs=1e-6)
    result.sum().backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_extreme_log_ratios_stay_finite() -> None:
    """[21] the log-ratio is clamped before exp: losses and gradients stay finite."""
    logprobs = torch.tensor([[0.0, -1e30, -1e4, 0.0]], requires_grad=True)
    proximal = torch.tensor([[-1e4, 0.0, 0.0, -1e30]])
    for sign in (1.0, -1.0):
        for dual_clip in (None, 3.0):
            ratio = maths.log_ratio(logprobs, proximal).exp()
            loss = maths.clipped_loss(ratio, torch.full((1, 4), sign), 0.2, 0.2, dual_clip).loss
            total = loss.sum() + maths.kl_k3(logprobs, proximal).sum()
            total = total + maths.kl_k3(proximal, logprobs).sum()
            (gradient,) = torch.autograd.grad(total, logprobs)
            assert torch.isfinite(loss).all()
            assert torch.isfinite(total)
            assert torch.isfinite(gradient).all()
    assert torch.isfinite(maths.importance_weight(logprobs.detach(), proximal, 1e30)).all()


def test_extreme_logits_stay_finite() -> None:
    """[21] log-probabilities and entropy of extreme logits, with their gradients."""
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]]], requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([[1, 2]]))
    total = logprobs.sum() + token_entropy(logits).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(gradient).all()


def test_importance_weight_is_capped_above_only() -> None:
    proximal = torch.tensor([[0.25, 0.25, 0.9, 0.1]]).log()
    behaviour = torch.tensor([[0.25, 0.50, 0.3, 0.8]]).log()
    expected = torch.tensor([[1.0, 0.5, 2.0, 0.125]])
    torch.testing.assert_close(maths.importance_weight(proximal, behaviour, 2.0), expected)


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 77.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert maths.explained_variance(returns + 5, returns, mask) == pytest.approx(1.0)
    assert maths.explained_variance(torch.ones(1, 4), returns, mask) == pytest.approx(0.0)
    # Errors 2, 4, 6: four times the variance of the returns.
    assert maths.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    half = torch.tensor([[1.5, 2.0, 2.5, 0.0]])  # errors -0.5, 0, 0.5: a quarter of it
    assert maths.explained_variance(half, returns, mask) == pytest.approx(0.75)
    assert maths.explained_variance(returns, torch.ones(1, 4), mask) == 0.0


# ---------------------------------------------------------------- REINFORCE++


def _plus(scores: list[float], kl: Tensor, mask: Tensor, coefficient: float, gamma: float) -> Any:
    inputs = AdvantageInputs(
        scores=torch.tensor(scores),
        kl=kl,
        kl_coefficient=coefficient,
        values=torch.zeros_like(mask),
        mask=mask,
        groups=torch.arange(len(scores)),
    )
    return estimators.estimate(ReinforcePlusPlus(kind="reinforce++", gamma=gamma), inputs)


def test_reinforce_plus_plus_by_hand() -> None:
    """[17] [18] the score less the KL penalties from each token on, whitened over all tokens."""
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    kl = torch.tensor([[1.0, 2.0, -1.0], [4.0, 99.0, 99.0]])
    advantages, returns = _plus([1.0, 3.0], kl, mask, coefficient=0.5, gamma=1.0)
    # Backwards: 1 + 0.5 = 1.5; 1.5 - 1 = 0.5; 0.5 - 0.5 = 0; and 3 - 2 = 1.
    expected = [0.0, 0.5, 1.5, 1.0]
    assert returns.tolist() == [[0.0, 0.5, 1.5], [1.0, 0.0, 0.0]]
    deviation = statistics.pstdev(expected)
    white = [(one - 0.75) / deviation for one in expected]
    torch.testing.assert_close(
        advantages, torch.tensor([white[:3], [white[3], 0.0, 0.0]]), atol=1e-5, rtol=0
    )
    _, discounted = _plus([1.0, 3.0], kl, mask, coefficient=0.5, gamma=0.5)
    assert discounted.tolist() == [[-0.625, -0.25, 1.5], [1.0, 0.0, 0.0]]


@given(st.floats(-10, 10, width=32), st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_reinforce_plus_plus_has_no_advantage_where_all_rewards_are_equal(
    reward: float, lengths: list[int]
) -> None:
    """[17] to the bit."""
    mask = (torch.arange(8) < torch.tensor(lengths).unsqueeze(-1)).float()
    advantages, _ = _plus([reward] * len(lengths), torch.zeros_like(mask), mask, 0.0, 1.0)
    assert not advantages.any()


@given(
    st.lists(
        st.tuples(st.floats(-5, 5, width=32), st.integers(1, 8)), min_size=2, max_size=8
    ).filter(lambda rows: len({round(score, 1) for score, _ in rows}) > 1)
)
def test_reinforce_plus_plus_has_mean_0_and_variance_1_over_tokens(
    rows: list[tuple[float, int]],
) -> None:
    """[18] padding left out; without a KL penalty all tokens of a rationale have one advantage."""
    mask = (torch.arange(8) < torch.tensor([n for _, n in rows]).unsqueeze(-1)).float()
    advantages, _ = _plus([score for score, _ in rows], torch.zeros_like(mask), mask, 0.1, 1.0)
    assert maths.masked_mean(advantages, mask).item() == pytest.approx(0, abs=1e-5)
    assert maths.masked_mean(advantages.square(), mask).item() == pytest.approx(1, abs=1e-3)
    for row, (_, length) in zip(advantages, rows, strict=True):
        assert torch.equal(row[:length], row[:1].expand(length))
        assert not row[length:].any()
