"""Distillation: supervised training of the small LM on the teacher's rationales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcot.learner.batching import BatchPlanner, MicroBatch, TokenPair
from lmcot.learner.engine import TrainEngine
from lmcot.learner.maths import token_logprobs
from lmcot.learner.ranks import sum_over_ranks


class Distiller:
    """Minimises the negative log-likelihood of the rationales, a mean over all their tokens.

    Every rank calls it with the whole batch.
    """

    def __init__(self, engine: TrainEngine, planner: BatchPlanner) -> None:
        self._engine = engine
        self._planner = planner

    def step(self, pairs: Sequence[TokenPair]) -> dict[str, float]:
        """One optimiser step on one batch; returns its metrics."""
        tokens = _response_tokens(pairs)
        own = torch.zeros((), dtype=torch.float64)
        for micro in self._planner.plan(pairs, range(len(pairs))):
            share = self._loss_sum(pairs, micro) * (micro.counted / tokens)
            self._engine.backward(share)
            own += share.item()
        loss = float(sum_over_ranks(own))
        result = self._engine.step()
        return {
            "loss": loss,
            "optimiser/grad_norm": result.grad_norm,
            "optimiser/learning_rate": result.learning_rate,
            "batch/tokens": float(tokens),
            "optimiser/skipped_updates": float(not result.applied),
        }

    @torch.no_grad()
    def validate(self, pairs: Sequence[TokenPair]) -> float:
        """The loss of rationales that are not learnt from: a mean over all their tokens."""
        own = torch.zeros((), dtype=torch.float64)
        for micro in self._planner.plan(pairs, range(len(pairs))):
            own += self._loss_sum(pairs, micro).item() * micro.counted
        return float(sum_over_ranks(own)) / _response_tokens(pairs)

    def _loss_sum(self, pairs: Sequence[TokenPair], micro: MicroBatch) -> Tensor:
        batch = self._planner.lay_out(pairs, micro)
        logits, _ = self._engine.forward(batch, values=False)
        return -token_logprobs(logits, batch.targets.to(logits.device)).sum()


def _response_tokens(pairs: Sequence[TokenPair]) -> int:
    return sum(len(response) for _, response in pairs)
