"""What a step learns from: its rationales, scored by the policy and the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmcot.config import RefineSettings
from lmcot.learner import maths
from lmcot.learner.advantages import AdvantageInputs, estimate
from lmcot.learner.batching import BatchPlanner, MicroBatch, TokenPair
from lmcot.learner.engine import TrainEngine
from lmcot.learner.ranks import sum_over_ranks
from lmcot.learner.vocabulary import token_logprobs
from lmcot.models.batches import pad_right
from lmcot.models.sequences import SequenceBatch
from lmcot.records import ScoredRollout

_ROUNDING = 1e-3
"""Nats per rationale that rounding alone may give."""

Forward = Callable[[SequenceBatch], Tensor]
"""Logits of a batch under some model, [tokens, vocabulary]."""
Reference = Callable[[], AbstractContextManager[Forward]]
"""Context manager that makes the reference model ready for one pass."""


class ExperienceTokens(NamedTuple):
    """An experience's values for the N tokens of some rationales, end to end; [N] each."""

    behaviour: Tensor
    proximal: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    response: Tensor
    """int64: the number of each token's rationale, from 0."""


@dataclass(slots=True)
class Experience:
    """A step's rationales with everything that the loss needs, the same on every rank.

    All tensors are [rationales, longest response], float32 on the CPU, 0 at padding.
    """

    pairs: list[TokenPair]
    policy_scored: bool
    """Whether ``proximal`` is filled; otherwise the step's only update fills it in."""
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

    def tokens(self, indices: Sequence[int], device: torch.device) -> ExperienceTokens:
        """The tokens of some rationales, in the order of a laid-out batch, on a device."""
        cells = self.cells(indices)
        lengths = self.mask[list(indices)].sum(-1).long()
        return ExperienceTokens(
            behaviour=self.behaviour[cells].to(device),
            proximal=self.proximal[cells].to(device),
            reference=self.reference[cells].to(device),
            values=self.values[cells].to(device),
            advantages=self.advantages[cells].to(device),
            returns=self.returns[cells].to(device),
            response=torch.arange(len(lengths)).repeat_interleave(lengths).to(device),
        )


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
            or settings.advantage.needs_critic
            or settings.kl.apply_to == "reward"
        )
        """Whether the policy scores the rationales before it learns from them. A step with a single
        update may need only the proximal log-probabilities; that update's own forward pass gives
        them, so the experience holds zeros until then."""

    @torch.no_grad()
    def make(
        self, scored: Sequence[ScoredRollout], scores: Tensor, kl_coefficient: float
    ) -> Experience:
        """What a step learns from.

        Args:
            scores: [rationales], from which the KL penalty is subtracted.
        """
        pairs: list[TokenPair] = [(s.rollout.prompt_ids, s.rollout.response_ids) for s in scored]
        behaviour, mask = _padded_floats([s.rollout.logprobs for s in scored])
        proximal, reference, values = self._passes(pairs, mask)
        in_reward = self._settings.kl.apply_to == "reward"
        inputs = AdvantageInputs(
            scores=scores,
            kl=maths.kl_k1(proximal, reference),
            kl_coefficient=kl_coefficient if in_reward else 0.0,
            values=values,
            mask=mask,
            groups=torch.tensor(_group_numbers(scored)),
        )
        advantages, returns = estimate(self._settings.advantage, inputs)
        return Experience(
            pairs=pairs,
            policy_scored=self.policy_pass,
            mask=mask,
            behaviour=behaviour,
            proximal=proximal,
            reference=reference,
            values=values,
            advantages=advantages,
            returns=returns,
        )

    def metrics(self, experience: Experience, scores: Tensor) -> dict[str, float]:
        """Metrics of a step's experience, once its proximal log-probabilities are filled in."""
        mask, proximal, behaviour = experience.mask, experience.proximal, experience.behaviour
        reference, values, returns = experience.reference, experience.values, experience.returns
        of_rationales = (maths.kl_k1(proximal, reference) * mask).sum(-1)
        cap = self._settings.importance_cap
        weight = maths.importance_weight(proximal, behaviour, cap)
        metrics = {
            "batch/tokens": float(mask.sum()),
            "reward/score": float(scores.mean()),
            "kl": float(of_rationales.mean()),
            "kl/negative_count": float((of_rationales < -_ROUNDING).sum()),
            "kl/k3": float(maths.masked_mean(maths.kl_k3(proximal, reference), mask)),
            "sampler/gap": float(((proximal - behaviour).abs() * mask).max()),
            "sampler/kl": float(maths.masked_mean(maths.kl_k3(behaviour, proximal), mask)),
            "sampler/importance_weight": float(maths.masked_mean(weight, mask)),
            "sampler/capped_share": float(maths.masked_mean((weight >= cap).float(), mask)),
            "sampler/effective_sample_size": float(maths.effective_sample_size(weight, mask)),
        }
        if self._settings.advantage.needs_critic:
            metrics |= {
                "value/mean": float(maths.masked_mean(values, mask)),
                "value/return": float(maths.masked_mean(returns, mask)),
                "value/explained_variance": maths.explained_variance(values, returns, mask),
            }
        return metrics

    def _passes(self, pairs: Sequence[TokenPair], mask: Tensor) -> Tensor:
        """[3, rationales, longest]: proximal and reference log-probabilities, and values.

        Each rank scores its share and holds zeros elsewhere, so the sum over ranks is exact.
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
        return token_logprobs(logits, batch.targets.to(logits.device), self._temperature)


def usable(scored: Sequence[ScoredRollout], *, in_groups: bool) -> list[ScoredRollout]:
    """Rationales that are not empty and, in groups, not the only one of their question."""
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


def _padded_floats(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Values and mask, float32 [rows, longest], padded with 0 on the right."""
    _, mask = pad_right([[0] * len(row) for row in rows], 0)
    values = torch.zeros(mask.shape)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.tensor(row)
    return values, mask.float()
