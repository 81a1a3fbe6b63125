"""One PPO step in plain loops, for the tests of the learner to compare with.

The model reads one unpadded response at a time, without the learner's batches, engine and
arithmetic; autograd differentiates it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmcot.config import Config, Gae, Grpo, ModelCritic, ReinforcePlusPlus
from lmcot.models.adapters import adapters_off, add_adapters
from lmcot.models.policy import Policy, critic_model, value_head
from lmcot.models.sources import load_model
from lmcot.records import Rollout, ScoredRollout


def plain_policy(config: Config, *, critic: bool = True) -> Policy:
    """The policy that a session begins with, which no engine has touched."""
    lm, _ = load_model(config.policy.source, config.policy.dtype)
    advantage = config.refine.advantage
    found: nn.Module | None = None
    if critic and isinstance(advantage, Gae):
        make = critic_model if isinstance(advantage.critic, ModelCritic) else value_head
        found = make(lm, config.seed)
    if config.policy.lora is not None:
        lm = add_adapters(lm, config.policy.lora, config.seed)
    return Policy(lm, found)


class Alone(NamedTuple):
    """What the policy says of one response, token by token."""

    logits: Tensor
    logprobs: Tensor
    entropies: Tensor
    values: Tensor


def alone(lm: Any, critic: Any, rollout: Rollout, temperature: float = 1.0) -> Alone:
    """One response through the plain models, by itself and without padding."""
    logits, hidden = _read(lm, rollout)
    logs = (logits / temperature).log_softmax(-1)
    values = torch.zeros(len(logs))
    if isinstance(critic, nn.Linear):
        values = critic(hidden).squeeze(-1)
    elif critic is not None:
        values = _read(critic, rollout)[0].squeeze(-1)
    ids = torch.tensor(rollout.response_ids)
    logprobs = logs[torch.arange(len(ids)), ids]
    return Alone(logits, logprobs, -(logs.exp() * logs).sum(-1), values)


def _read(lm: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states where the response's tokens are predicted."""
    asked, answer = list(rollout.prompt_ids), list(rollout.response_ids)
    if lm.config.is_encoder_decoder:
        decoder = torch.tensor([[lm.config.decoder_start_token_id, *answer[:-1]]])
        out = lm(
            input_ids=torch.tensor([asked]), decoder_input_ids=decoder, output_hidden_states=True
        )
        return out.logits[0], out.decoder_hidden_states[-1][0]
    out = lm(input_ids=torch.tensor([asked + answer[:-1]]), output_hidden_states=True)
    return out.logits[0, len(asked) - 1 :], out.hidden_states[-1][0, len(asked) - 1 :]


def loss_by_hand(
    policy: Policy, reference: Any, scored: Sequence[ScoredRollout], config: Config
) -> Tensor:
    """The loss of a first update, whose gradient is that of PPO's: all ratios are 1.

    Args:
        reference: None if it is the policy without its adapters.
    """
    settings, temperature = config.refine, config.policy.temperature
    rows = [alone(policy.lm, policy.critic, one.rollout, temperature) for one in scored]
    with torch.no_grad():
        if reference is not None:
            old = [alone(reference, None, one.rollout, temperature) for one in scored]
        else:
            with adapters_off(policy.lm):
                old = [alone(policy.lm, None, one.rollout, temperature) for one in scored]
    kls = [
        [p - q for p, q in zip(row.logprobs.tolist(), ref.logprobs.tolist(), strict=True)]
        for row, ref in zip(rows, old, strict=True)
    ]
    in_reward = settings.kl.coefficient if settings.kl.apply_to == "reward" else 0.0
    in_loss = settings.kl.coefficient - in_reward
    returns: list[list[float]] = []
    if isinstance(settings.advantage, Gae):
        advantages, returns = _gae_by_hand(settings.advantage, scored, rows, kls, in_reward)
    elif isinstance(settings.advantage, ReinforcePlusPlus):
        advantages = _whitened_returns(settings.advantage.gamma, scored, kls, in_reward)
    else:
        advantages = _group_advantages(settings.advantage, scored, kls, in_reward)
    loss = torch.zeros(())
    for i, (one, row) in enumerate(zip(scored, rows, strict=True)):
        for t in range(len(row.logprobs)):
            behaviour = torch.tensor(one.rollout.logprobs[t])
            weight = float((row.logprobs[t].detach() - behaviour).exp())
            weight = min(weight, settings.importance_cap)
            loss = loss - advantages[i][t] * weight * row.logprobs[t]
            loss = loss + in_loss * kls[i][t] * row.logprobs[t]
            loss = loss - settings.entropy_coefficient * row.entropies[t]
            if isinstance(settings.advantage, Gae):
                error = row.values[t] - returns[i][t]
                loss = loss + settings.advantage.value_coefficient * error * error / 2
    return loss / sum(len(row.logprobs) for row in rows)


def _gae_by_hand(
    settings: Gae,
    scored: Sequence[ScoredRollout],
    rows: Sequence[Alone],
    kls: Sequence[Sequence[float]],
    coefficient: float,
) -> tuple[list[list[float]], list[list[float]]]:
    """Whitened advantages by the double sum, and returns."""
    raw, returns = [], []
    for one, row, kl in zip(scored, rows, kls, strict=True):
        rewards = [-coefficient * k for k in kl]
        rewards[-1] += one.reward
        v = [*row.values.tolist(), 0.0]
        deltas = [r + settings.gamma * v[t + 1] - v[t] for t, r in enumerate(rewards)]
        decay = settings.gamma * settings.lam
        steps = range(len(deltas))
        raw.append([sum(decay ** (k - t) * deltas[k] for k in steps if k >= t) for t in steps])
        returns.append([a + v[t] for t, a in enumerate(raw[-1])])
    return _whitened(raw), returns


def _whitened_returns(
    gamma: float,
    scored: Sequence[ScoredRollout],
    kls: Sequence[Sequence[float]],
    coefficient: float,
) -> list[list[float]]:
    """The discounted rewards from each token on, by the sum, whitened."""
    found = []
    for one, kl in zip(scored, kls, strict=True):
        rewards = [-coefficient * k for k in kl]
        rewards[-1] += one.reward
        steps = range(len(rewards))
        found.append([sum(gamma ** (k - t) * rewards[k] for k in steps if k >= t) for t in steps])
    return _whitened(found)


def _whitened(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    everything = [one for row in rows for one in row]
    mean, deviation = statistics.fmean(everything), statistics.pstdev(everything)
    return [[(one - mean) / deviation for one in row] for row in rows]


def _group_advantages(
    settings: Any,
    scored: Sequence[ScoredRollout],
    kls: Sequence[Sequence[float]],
    coefficient: float,
) -> list[list[float]]:
    rewards = [one.reward - coefficient * sum(kl) for one, kl in zip(scored, kls, strict=True)]
    found = []
    for i, one in enumerate(scored):
        others = [
            rewards[j]
            for j, other in enumerate(scored)
            if j != i and other.rollout.example_id == one.rollout.example_id
        ]
        advantage = rewards[i] - statistics.fmean(others)
        if isinstance(settings, Grpo):
            group = [rewards[i], *others]
            advantage = rewards[i] - statistics.fmean(group)
            advantage /= statistics.stdev(group) + 1e-6 if settings.normalise else 1
        found.append([advantage] * len(one.rollout.response_ids))
    return found


def gradients(policy: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of all that trains, zeros where the loss does not depend on it."""
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }


def global_norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def stateless_step(
    before: dict[str, Tensor], found: dict[str, Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    """What `STATELESS` makes of a gradient."""
    return {
        name: parameter - 0.5 * found[name] * scale / ((found[name] * scale).abs() + 1.0)
        for name, parameter in before.items()
    }
