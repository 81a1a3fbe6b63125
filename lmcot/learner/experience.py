"""What a step learns from: its rationales, scored by the policy and the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcot.config import Gae, RefineSettings
from lmcot.learner import maths
from lmcot.learner.batching import BatchPlanner, MicroBatch, TokenPair
from lmcot.learner.engine import TrainEngine
from lmcot.learner.ranks import sum_over_ranks
from lmcot.models.batches import pad_right
from lmcot.models.sequences import SequenceBatch
from lmcot.records import ScoredRollout

_ROUNDING = 1e-3
"""Nats per rationale that arithmetic alone may give."""

Forward = Callable[[SequenceBatch], Tensor]
"""Logits of a batch under some model, [tokens, vocabulary]."""
Reference = Callable[[], AbstractContextManager[Forward]]
"""Makes the reference model ready for the time of a pass."""


@dataclass(slots=True)
class Experience:
    """A step's rationales with all that the loss needs, the same on every rank.

    All tensors are [rationales, longest response], float32 on the CPU, 0 at padding.
    """

    pairs: list[TokenPair]
    mask: Tensor
    behaviour: Tensor
    proximal: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def cells(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows and columns of all tokens of some rationales, in the order of a laid-out batch."""
        return cells(self.mask, indices)


class ExperienceMaker:
    """Scores rationales and estimates advantages; called by all ranks together."""

    def __init__(
        self,
        engine: TrainEngine,
        reference: Reference,
        planner: BatchPlanner,
        settings: RefineSettings,
        temperature: float,
    ) -> None:
        self._engine = engine
        self._reference = reference
        self._planner = planner
        self._settings = settings
        self._temperature = temperature
        self.policy_pass = (
            settings.epochs * settings.minibatches > 1
            or isinstance(settings.advantage, Gae)
            or settings.kl.apply_to == "reward"
        )
        """Whether the policy scores the rationales before it learns from them. Where nothing is
        made of that but the proximal log-probabilities of a single update, that update's own pass
        has them; then they are zeros here, for it to fill in."""

    @torch.no_grad()
    def make(
        self, scored: Sequence[ScoredRollout], scores: Tensor, kl_coefficient: float
    ) -> Experience:
        """What a step learns from.

        Args:
            scores: [rationales], what the KL penalty is taken from.
        """
        pairs: list[TokenPair] = [(s.rollout.prompt_ids, s.rollout.response_ids) for s in scored]
        behaviour, mask = _padded_floats([s.rollout.logprobs for s in scored])
        proximal, reference, values = self._passes(pairs, mask)
        in_reward = self._settings.kl.apply_to == "reward"
        kl = maths.kl_k1(proximal, reference)
        advantages, returns = self._advantages(
            scored, scores, kl, values, mask, kl_coefficient if in_reward else 0.0
        )
        return Experience(pairs, mask, behaviour, proximal, reference, values, advantages, returns)

    def metrics(
        self, experience: Experience, scored: Sequence[ScoredRollout], scores: Tensor
    ) -> dict[str, float]:
        """Of a step's experience, whose proximal log-probabilities are all there."""
        mask, proximal, behaviour = experience.mask, experience.proximal, experience.behaviour
        reference, values, returns = experience.reference, experience.values, experience.returns
        of_rationales = (maths.kl_k1(proximal, reference) * mask).sum(-1)
        weight = maths.importance_weight(proximal, behaviour, self._settings.importance_cap)
        metrics = {
            **_reward_spread(scored),
            "batch/tokens": float(mask.sum()),
            "reward/score": float(scores.mean()),
            "kl": float(of_rationales.mean()),
            "kl/negative_count": float((of_rationales < -_ROUNDING).sum()),
            "kl/k3": float(maths.masked_mean(maths.kl_k3(proximal, reference), mask)),
            "sampler/gap": float(((proximal - behaviour).abs() * mask).max()),
            "sampler/kl": float(maths.masked_mean(maths.kl_k3(behaviour, proximal), mask)),
            "sampler/importance_weight": float(maths.masked_mean(weight, mask)),
        }
        if isinstance(self._settings.advantage, Gae):
            metrics |= {
                "value/mean": float(maths.masked_mean(values, mask)),
                "value/return": float(maths.masked_mean(returns, mask)),
                "value/explained_variance": maths.explained_variance(values, returns, mask),
            }
        return metrics

    def _passes(self, pairs: Sequence[TokenPair], mask: Tensor) -> Tensor:
        """[3, rationales, longest]: proximal and reference log-probabilities, and values.

        Each rank scores its share; the sum over ranks is exact, for the others hold zeros.
        """
        plan = self._planner.plan(pairs, range(len(pairs)))
        found = torch.zeros(3, *mask.shape)

        def note(number: int, batch: MicroBatch, values: Tensor) -> None:
            if batch.counted:
                rows, columns = cells(mask, batch.indices)
                found[number, rows, columns] = values.float().cpu()

        for micro in plan if self.policy_pass else []:
            batch = self._planner.lay_out(pairs, micro)
            logits, value = self._engine.forward(batch, values=True)
            note(0, micro, self._logprobs(logits, batch))
            if value is not None:
                note(2, micro, value)
        with self._reference() as forward:
            for micro in plan:
                batch = self._planner.lay_out(pairs, micro)
                note(1, micro, self._logprobs(forward(batch), batch))
        return sum_over_ranks(found)

    def _logprobs(self, logits: Tensor, batch: SequenceBatch) -> Tensor:
        return maths.token_logprobs(logits, batch.targets.to(logits.device), self._temperature)

    def _advantages(
        self,
        scored: Sequence[ScoredRollout],
        scores: Tensor,
        kl: Tensor,
        values: Tensor,
        mask: Tensor,
        coefficient: float,
    ) -> tuple[Tensor, Tensor]:
        """Advantages, and returns (zeros where there is no critic), [rationales, longest]."""
        settings = self._settings.advantage
        if isinstance(settings, Gae):
            rewards = maths.token_rewards(scores, kl, mask, coefficient)
            advantages, returns = maths.gae(rewards, values, mask, settings.gamma, settings.lam)
            return maths.whiten(advantages, mask), returns
        rewards = scores - coefficient * (kl * mask).sum(-1)
        groups = torch.tensor(_group_numbers(scored))
        if settings.kind == "rloo":
            advantages = maths.rloo(rewards, groups)
        else:
            advantages = maths.grpo(rewards, groups, normalise=settings.normalise)
        return advantages.unsqueeze(-1) * mask, torch.zeros_like(mask)


def usable(scored: Sequence[ScoredRollout], *, in_groups: bool) -> list[ScoredRollout]:
    """Rationales that can be learnt from: not empty and, in groups, not alone with its question."""
    kept = [one for one in scored if one.rollout.response_ids]
    if not in_groups:
        return kept
    sizes = Counter(_question(one) for one in kept)
    return [one for one in kept if sizes[_question(one)] > 1]


def cells(mask: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows and columns where ``mask`` is 1 in some rows, row by row in the order given."""
    order = torch.tensor(list(indices))
    rows, columns = mask[order].nonzero(as_tuple=True)
    return order[rows], columns


def _question(scored: ScoredRollout) -> tuple[str, tuple[int, ...]]:
    return scored.rollout.example_id, scored.rollout.prompt_ids


def _group_numbers(scored: Sequence[ScoredRollout]) -> list[int]:
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    return [numbers.setdefault(_question(one), len(numbers)) for one in scored]


def _reward_spread(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """The least and the greatest reward; the share of questions whose rationales have all one.

    Only questions with several rationales count there. Where none has, the step's rationales are
    taken as one question's: PPO compares them with each other all the same.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[float]] = {}
    for one in scored:
        groups.setdefault(_question(one), []).append(one.reward)
    several = [rewards for rewards in groups.values() if len(rewards) > 1]
    if not several and len(scored) > 1:
        several = [[one.reward for one in scored]]
    equal = [min(rewards) == max(rewards) for rewards in several]
    return {
        "reward/min": min(one.reward for one in scored),
        "reward/max": max(one.reward for one in scored),
        **({"reward/equal_groups": sum(equal) / len(equal)} if equal else {}),
    }


def _padded_floats(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Values and mask, float32 [rows, longest], padded with 0 on the right."""
    _, mask = pad_right([[0] * len(row) for row in rows], 0)
    values = torch.zeros(mask.shape)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.tensor(row)
    return values, mask.float()
