"""Distillation: supervised training of the small LM on the teacher's rationales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcot.learner.batching import micro_batches
from lmcot.learner.engine import TrainEngine
from lmcot.learner.maths import token_logprobs
from lmcot.models.policy import Policy, make_batch

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and response ids (EOS included)."""


class Distiller:
    """Minimises the negative log-likelihood of the rationales, a mean over all their tokens."""

    def __init__(
        self, policy: Policy, engine: TrainEngine, *, pad_id: int, micro_batch_size: int
    ) -> None:
        self._policy = policy
        self._engine = engine
        self._pad_id = pad_id
        self._micro_batch_size = micro_batch_size

    def step(self, pairs: Sequence[TokenPair]) -> dict[str, float]:
        """One optimiser step on one batch; returns its metrics."""
        total = sum(len(response) for _, response in pairs)
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        loss = 0.0
        for rows in micro_batches(lengths, self._micro_batch_size):
            share = self._loss_sum([pairs[row] for row in rows]) / total
            self._engine.backward(share)
            loss += share.item()
        result = self._engine.step()
        return {
            "loss": loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens": float(total),
        }

    def _loss_sum(self, pairs: Sequence[TokenPair]) -> Tensor:
        batch = make_batch(
            [prompt for prompt, _ in pairs],
            [response for _, response in pairs],
            pad_id=self._pad_id,
            encoder_decoder=self._policy.encoder_decoder,
        )
        logits, _ = self._engine.engine(batch, values=False)
        ids, mask = batch.response_ids.to(logits.device), batch.response_mask.to(logits.device)
        return -(token_logprobs(logits, ids) * mask).sum().to(torch.float32)
