"""Distillation: supervised training of the small LM on the teacher's rationales."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
        tokens = sum(len(response) for _, response in pairs)
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

    def _loss_sum(self, pairs: Sequence[TokenPair], micro: MicroBatch) -> torch.Tensor:
        batch = self._planner.lay_out(pairs, micro)
        logits, _ = self._engine.forward(batch, values=False)
        return -token_logprobs(logits, batch.targets.to(logits.device)).sum()
