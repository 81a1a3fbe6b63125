"""One PPO step: from scored rationales to an updated policy (Schulman et al. 2017).

Three log-probabilities of each token play a part: *behaviour* (the sampler's), *proximal* (the
learner's at the start of the step) and *current*. The ratio is current / proximal; one truncated
importance weight, proximal / behaviour, corrects for how the sampler differs from the learner.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcot.config import RefineSettings
from lmcot.learner import maths
from lmcot.learner.batching import micro_batches, split_evenly
from lmcot.learner.engine import StepResult, TrainEngine
from lmcot.learner.kl_control import KlController
from lmcot.models.batches import pad_right
from lmcot.models.policy import Policy, SequenceBatch, make_batch, response_logits
from lmcot.records import ScoredRollout


@dataclass(slots=True)
class Experience:
    """A step's rationales with all that the loss needs, rows padded to the longest response.

    All tensors are [rows, response], float32 on the CPU.
    """

    rollouts: Sequence[ScoredRollout]
    mask: Tensor
    behaviour: Tensor
    proximal: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weight: Tensor


class PPO:
    """Holds the policy, its reference and the KL controller; learns one batch at a time."""

    def __init__(
        self,
        policy: Policy,
        reference: PreTrainedModel,
        engine: TrainEngine,
        settings: RefineSettings,
        *,
        temperature: float,
        pad_id: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        self._policy = policy
        self._reference = reference
        self._engine = engine
        self._settings = settings
        self._temperature = temperature
        self._pad_id = pad_id
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self.kl_controller = KlController(settings.kl)

    def step(self, scored: Sequence[ScoredRollout], step: int) -> dict[str, float]:
        """Learns one batch; ``step`` counts from 0. Returns the step's metrics."""
        experience, metrics = self._experience(scored)
        warming = step < self._settings.critic_warmup_steps
        updates = self._update(experience, step, warming)
        kl = metrics["kl"]
        self.kl_controller.update(kl, len(scored))
        return {
            **metrics,
            **updates,
            "coefficient/kl": self.kl_controller.coefficient,
            "warning/negative_kl": float(kl < 0),
        }

    @torch.no_grad()
    def _experience(self, scored: Sequence[ScoredRollout]) -> tuple[Experience, dict[str, float]]:
        """Scores the batch under the policy and the reference, and estimates advantages."""
        settings = self._settings
        behaviour, mask = _padded_floats([s.rollout.logprobs for s in scored])
        proximal, reference, values = (torch.zeros_like(mask) for _ in range(3))
        for rows in self._micro_batches(scored):
            batch = self._batch([scored[row] for row in rows])
            width = batch.response_ids.shape[1]
            logits, value = self._engine.engine(batch, values=True)
            proximal[rows, :width] = self._logprobs(logits, batch)
            values[rows, :width] = value.cpu()
            logits, _ = response_logits(self._reference, batch)
            reference[rows, :width] = self._logprobs(logits, batch)
        proximal, reference, values = proximal * mask, reference * mask, values * mask
        scores = self._scores(scored)
        kl = maths.kl_k1(proximal, reference)
        rewards = maths.token_rewards(scores, kl, mask, self.kl_controller.coefficient)
        advantages, returns = maths.gae(rewards, values, mask, settings.gamma, settings.lam)
        weight = maths.importance_weight(proximal, behaviour, settings.importance_cap)
        experience = Experience(
            scored, mask, behaviour, proximal, reference, values,
            maths.whiten(advantages, mask), returns, weight,
        )  # fmt: skip
        return experience, {
            "score": float(scores.mean()),
            "kl": float((kl * mask).sum(-1).mean()),
            "kl_k3": float(maths.masked_mean(maths.kl_k3(proximal, reference), mask)),
            "sampler_gap": float(((proximal - behaviour).abs() * mask).max()),
            "importance_weight": float(maths.masked_mean(weight, mask)),
            "value": float(maths.masked_mean(values, mask)),
            "return": float(maths.masked_mean(returns, mask)),
            "explained_variance": maths.explained_variance(values, returns, mask),
        }

    def _scores(self, scored: Sequence[ScoredRollout]) -> Tensor:
        """[rows] rewards, cut rationales penalised, clipped before the KL penalty is added."""
        bound = self._settings.reward_clip
        cut = torch.tensor([float(s.rollout.finish_reason == "length") for s in scored])
        rewards = torch.tensor([s.reward for s in scored])
        return (rewards - self._settings.length_penalty * cut).clamp(-bound, bound)

    def _update(self, experience: Experience, step: int, warming: bool) -> dict[str, float]:
        """All optimiser steps on one batch; returns means of their metrics over tokens."""
        settings = self._settings
        totals: dict[str, float] = {}
        results: list[StepResult] = []
        tokens_seen, stopped_early = 0.0, False
        for epoch in range(settings.epochs):
            rows = list(range(len(experience.rollouts)))
            random.Random(f"{self._seed}/{step}/{epoch}").shuffle(rows)
            epoch_kl, epoch_tokens = 0.0, 0.0
            for minibatch in split_evenly(rows, settings.minibatches):
                tokens = float(experience.mask[minibatch].sum())
                sums = self._accumulate(experience, minibatch, tokens, warming)
                results.append(self._engine.step(frozen_groups=(0,) if warming else ()))
                tokens_seen += tokens
                epoch_tokens += tokens
                epoch_kl += sums["approx_kl"]
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value
            if settings.target_kl is not None and epoch_kl / epoch_tokens > settings.target_kl:
                stopped_early = True
                break
        means = {name: value / tokens_seen for name, value in totals.items()}
        return {
            **means,
            "grad_norm": sum(r.grad_norm for r in results) / len(results),
            "learning_rate": results[-1].learning_rate,
            "updates": float(len(results)),
            "stopped_early": float(stopped_early),
        }

    def _accumulate(
        self, experience: Experience, minibatch: list[int], tokens: float, warming: bool
    ) -> dict[str, float]:
        """Backward passes over one minibatch; returns sums over its tokens."""
        scored = [experience.rollouts[row] for row in minibatch]
        sums: dict[str, float] = {}
        for micro in self._micro_batches(scored):
            rows = [minibatch[index] for index in micro]
            loss, parts = self._loss(experience, rows, warming)
            self._engine.backward(loss / tokens)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def _loss(
        self, experience: Experience, rows: list[int], warming: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss summed over the tokens of some rows, and its parts likewise."""
        settings = self._settings
        batch = self._batch([experience.rollouts[row] for row in rows])
        width = batch.response_ids.shape[1]
        logits, values = self._engine.engine(batch, values=True, head_only=warming)
        ids = batch.response_ids.to(logits.device)

        def rows_of(tensor: Tensor) -> Tensor:
            return tensor[rows, :width].to(logits.device)

        mask, proximal = rows_of(experience.mask), rows_of(experience.proximal)
        logprobs = maths.token_logprobs(logits, ids, self._temperature)
        policy, clipped = maths.policy_loss(
            logprobs, proximal, rows_of(experience.advantages), settings.clip, settings.dual_clip
        )
        policy = policy * rows_of(experience.weight)
        value = maths.value_loss(
            values, rows_of(experience.values), rows_of(experience.returns), settings.value_clip
        )
        entropy = self._entropy(logits)
        total = settings.value_coefficient * value
        if warming:
            # The zero keeps a gradient (of zeros) on the trunk, which the engine expects.
            total = total + 0.0 * policy
        else:
            total = total + policy - settings.entropy_coefficient * entropy
        parts = {
            "policy_loss": policy,
            "value_loss": value,
            "entropy": entropy,
            "clip_fraction": clipped,
            "approx_kl": maths.kl_k3(proximal, logprobs),
        }
        sums = {name: float((part.detach() * mask).sum()) for name, part in parts.items()}
        return (total * mask).sum(), sums

    def _entropy(self, logits: Tensor) -> Tensor:
        """[rows, response]; tracked by autograd only if it is part of the loss."""
        with torch.set_grad_enabled(self._settings.entropy_coefficient > 0):
            return maths.token_entropy(logits, self._temperature)

    def _logprobs(self, logits: Tensor, batch: SequenceBatch) -> Tensor:
        ids = batch.response_ids.to(logits.device)
        return maths.token_logprobs(logits, ids, self._temperature).cpu()

    def _batch(self, scored: Sequence[ScoredRollout]) -> SequenceBatch:
        return make_batch(
            [s.rollout.prompt_ids for s in scored],
            [s.rollout.response_ids for s in scored],
            pad_id=self._pad_id,
            encoder_decoder=self._policy.encoder_decoder,
        )

    def _micro_batches(self, scored: Sequence[ScoredRollout]) -> list[list[int]]:
        lengths = [len(s.rollout.prompt_ids) + len(s.rollout.response_ids) for s in scored]
        return micro_batches(lengths, self._micro_batch_size)


def _padded_floats(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Values and mask, float32 [rows, longest], padded with 0 on the right."""
    _, mask = pad_right([[0] * len(row) for row in rows], 0)
    values = torch.zeros(mask.shape)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.tensor(row)
    return values, mask.float()
