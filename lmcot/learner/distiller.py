"""Distillation: supervised training of the small LM on the teacher's rationales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcot.learner.batching import BatchPlanner, MicroBatch, TokenPair
from lmcot.learner.engine import TrainEngine
from lmcot.learner.ranks import sum_over_ranks
from lmcot.learner.vocabulary import token_logprobs


class Distiller:
    """Minimises the negative log-likelihood of rationales, a mean over all their tokens.

    Answers may be a second task: the mean over their tokens, times a weight, is added. Every rank
    calls it with the whole batch.
    """

    def __init__(self, engine: TrainEngine, planner: BatchPlanner) -> None:
        self._engine = engine
        self._planner = planner

    def step(
        self,
        rationales: Sequence[TokenPair],
        answers: Sequence[TokenPair] = (),
        answer_weight: float = 1.0,
    ) -> dict[str, float]:
        """One optimiser step on one batch; returns its metrics."""
        pairs, tokens = [*rationales, *answers], _tokens(rationales, answers)
        weights = torch.tensor([1.0, answer_weight]) / torch.tensor(tokens).clamp_min(1)
        own = torch.zeros(2, dtype=torch.float64)
        for micro in self._planner.plan(pairs, range(len(pairs))):
            sums = self._loss_sums(pairs, micro, len(rationales))
            self._engine.backward((sums * weights.to(sums.device)).sum() * float(micro.counted))
            own += sums.detach().double().cpu() * micro.counted
        losses = _means(sum_over_ranks(own), tokens)
        result = self._engine.step()
        return {
            **losses,
            "optimiser/grad_norm": result.grad_norm,
            "optimiser/learning_rate": result.learning_rate,
            "batch/tokens": float(sum(tokens)),
            "optimiser/skipped_updates": float(not result.applied),
        }

    @torch.no_grad()
    def validate(
        self, rationales: Sequence[TokenPair], answers: Sequence[TokenPair] = ()
    ) -> dict[str, float]:
        """The losses of what is not learnt from, by the names that `step` gives them."""
        pairs = [*rationales, *answers]
        own = torch.zeros(2, dtype=torch.float64)
        for micro in self._planner.plan(pairs, range(len(pairs))):
            sums = self._loss_sums(pairs, micro, len(rationales))
            own += sums.double().cpu() * micro.counted
        return _means(sum_over_ranks(own), _tokens(rationales, answers))

    def _loss_sums(self, pairs: Sequence[TokenPair], micro: MicroBatch, rationales: int) -> Tensor:
        """The negative log-likelihoods of a micro-batch, summed over rationales and over answers.

        Args:
            rationales: how many of the pairs are rationales; the others are answers.
        """
        batch = self._planner.lay_out(pairs, micro)
        logits, _ = self._engine.forward(batch, values=False)
        losses = -token_logprobs(logits, batch.targets.to(logits.device))
        is_answer = [index >= rationales for index in micro.indices for _ in pairs[index][1]]
        answers = torch.tensor(is_answer, device=losses.device)
        zero = torch.zeros((), device=losses.device)
        return torch.stack([losses.where(~answers, zero).sum(), losses.where(answers, zero).sum()])


def _tokens(rationales: Sequence[TokenPair], answers: Sequence[TokenPair]) -> tuple[int, int]:
    """Response tokens of both tasks."""
    counts = [sum(len(response) for _, response in pairs) for pairs in (rationales, answers)]
    return counts[0], counts[1]


def _means(sums: Tensor, tokens: tuple[int, int]) -> dict[str, float]:
    """The mean loss of each task; that of the answers only if there are some."""
    found = {"loss": float(sums[0]) / tokens[0]}
    return {**found, "loss/answer": float(sums[1]) / tokens[1]} if tokens[1] else found
