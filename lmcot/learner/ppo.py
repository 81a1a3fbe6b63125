"""One PPO step: from scored rationales to an updated policy (Schulman et al. 2017).

Three log-probabilities of each token play a part: *behaviour* (the sampler's), *proximal* (the
learner's at the start of the step) and *current*. The ratio is current / proximal; one truncated
importance weight, proximal / behaviour, corrects for how the sampler differs from the learner. In a
step's first update current equals proximal, so a step with a single update may skip the scoring
pass before it (`ExperienceMaker.policy_pass`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmcot.config import RefineSettings
from lmcot.learner.batching import BatchPlanner, MicroBatch, split_evenly
from lmcot.learner.engine import StepResult, TrainEngine
from lmcot.learner.experience import Experience, ExperienceMaker, Reference, usable
from lmcot.learner.kl_control import KlController
from lmcot.learner.objective import Objective, Update
from lmcot.learner.ranks import max_over_ranks, sum_over_ranks
from lmcot.learner.reward_scale import RewardScale
from lmcot.records import ScoredRollout

POLICY_GROUP = 0
"""Index of the policy's parameters among the engine's groups; the critic's follow."""


class PPO:
    """Learns one batch at a time; every rank calls `step` with the whole batch."""

    def __init__(
        self,
        engine: TrainEngine,
        reference: Reference,
        planner: BatchPlanner,
        settings: RefineSettings,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self._engine = engine
        self._planner = planner
        self._settings = settings
        self._seed = seed
        self._maker = ExperienceMaker(engine, reference, planner, settings, temperature)
        self._objective = Objective(engine, planner, settings, temperature, max_new_tokens)
        self.kl_controller = KlController(settings.kl)
        self.reward_scale = RewardScale()

    def step(self, scored: Sequence[ScoredRollout], step: int) -> dict[str, float]:
        """Learns one batch; ``step`` counts from 0. Returns the step's metrics.

        Raises:
            ValueError: if no rationale of the batch is usable.
        """
        batch = usable(scored, in_groups=self._settings.advantage.needs_group)
        if not batch:
            raise ValueError(
                f"no usable rationales: all {len(scored)} are empty or the only sample of their "
                "question"
            )
        scores = self._scores(batch)
        experience = self._maker.make(batch, scores, self.kl_controller.coefficient)
        updates = self._update(experience, step)
        if not experience.policy_scored:
            experience.proximal = sum_over_ranks(experience.proximal)
        metrics = self._maker.metrics(experience, scores)
        if math.isfinite(metrics["kl"]):
            self.kl_controller.update(metrics["kl"], len(batch))
        return {
            **metrics,
            **updates,
            "batch/dropped": float(len(scored) - len(batch)),
            "kl/coefficient": self.kl_controller.coefficient,
            "kl/negative": float(metrics["kl"] < 0),
        }

    def _scores(self, scored: Sequence[ScoredRollout]) -> Tensor:
        """[rationales] rewards, scaled and clipped; no KL penalty in them yet."""
        settings = self._settings
        rewards = [one.reward for one in scored]
        if settings.scale_rewards:
            rewards = self.reward_scale.scale(rewards)
        return torch.tensor(rewards).clamp(-settings.reward_clip, settings.reward_clip)

    def _update(self, experience: Experience, step: int) -> dict[str, float]:
        """All optimiser steps on one batch; returns means of their metrics over tokens."""
        baseline = self._settings.advantage.critic_baseline
        warming = baseline is not None and step < baseline.critic_warmup_steps
        totals: dict[str, float] = {}
        extremes: list[Tensor] = []
        results: list[StepResult] = []
        tokens_seen, tokens_spared, stopped_early = 0.0, 0.0, False
        for minibatch in self._minibatches(experience, step):
            tokens = float(experience.mask[minibatch].sum())
            spared = self._without_gradient(experience, minibatch)
            update = Update(minibatch, tokens, spared, self.kl_controller.coefficient, warming)
            sums, extreme = self._accumulate(experience, update)
            extremes.append(extreme)
            frozen = (POLICY_GROUP,) if warming else ()
            results.append(self._engine.step(frozen))
            tokens_seen += tokens
            tokens_spared += float(experience.mask[sorted(spared)].sum())
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
            target = self._settings.target_kl  # the sums are all ranks', and so is the decision
            if target is not None and sums["policy/approx_kl"] / tokens > target:
                stopped_early = True
                break
        least, greatest = max_over_ranks(torch.stack(extremes).amax(0).cpu().double()).tolist()
        applied = [result for result in results if result.applied]
        return {
            **{name: value / tokens_seen for name, value in totals.items()},
            "batch/no_backward": tokens_spared / tokens_seen,
            "policy/ratio_min": math.exp(-least),
            "policy/ratio_max": math.exp(greatest),
            "optimiser/grad_norm": sum(r.grad_norm for r in applied) / max(len(applied), 1),
            "optimiser/learning_rate": results[-1].learning_rate,
            "optimiser/updates": float(len(applied)),
            "optimiser/skipped_updates": float(len(results) - len(applied)),
            "optimiser/stopped_early": float(stopped_early),
        }

    def _minibatches(self, experience: Experience, step: int) -> list[list[int]]:
        """Indices of each optimiser step: each pass has another order of the questions, and a
        question's rationales stay together where the number of minibatches allows it."""
        questions: dict[tuple[int, ...], list[int]] = {}
        for index, (prompt, _) in enumerate(experience.pairs):
            questions.setdefault(tuple(prompt), []).append(index)
        minibatches: list[list[int]] = []
        for epoch in range(self._settings.epochs):
            order = list(questions.values())
            random.Random(f"{self._seed}/{step}/{epoch}").shuffle(order)
            indices = [index for members in order for index in members]
            parts = split_evenly(indices, self._settings.minibatches)
            # Sorted, so that a minibatch of the whole step is cut as it was for scoring.
            minibatches.extend(sorted(part) for part in parts)
        return minibatches

    def _without_gradient(self, experience: Experience, minibatch: list[int]) -> frozenset[int]:
        """The rationales of a minibatch that need no backward pass.

        They are whole questions whose rationales all have advantage 0 at every token, since a
        question's rationales share the pass through its prompt. One rationale of the minibatch
        remains in any case: the optimiser moves by its momentum even where the gradient is 0.
        """
        if not self._objective.follows_advantages_only(self.kl_controller.coefficient):
            return frozenset()
        learnt = {
            tuple(experience.pairs[index][0])
            for index in minibatch
            if experience.advantages[index].any()
        }
        spared = [i for i in minibatch if tuple(experience.pairs[i][0]) not in learnt]
        return frozenset(spared[1:] if len(spared) == len(minibatch) else spared)

    def _accumulate(
        self, experience: Experience, update: Update
    ) -> tuple[dict[str, float], Tensor]:
        """Forward passes over one minibatch, and backward passes where there is a gradient.

        Returns:
            the metrics' sums over the tokens of all ranks; and the largest of this rank's negated
            log-ratios and of its log-ratios, [2].
        """
        sums: dict[str, Tensor] = {}
        extreme = torch.full((2,), -math.inf)
        for micro, backward in self._passes(experience, update):
            with torch.set_grad_enabled(backward):
                found = self._objective.loss(experience, micro, update)
            if backward:
                self._engine.backward(found.loss * (micro.counted / update.tokens))
            for name, value in found.metrics.items():
                sums[name] = sums.get(name, torch.zeros(())) + value * micro.counted
            if micro.counted:
                ends = torch.stack([-found.log_ratios.min(), found.log_ratios.max()]).cpu()
                extreme = torch.maximum(extreme, ends)
        added = sum_over_ranks(torch.stack(list(sums.values())).cpu().double())
        return dict(zip(sums, added.tolist(), strict=True)), extreme

    def _passes(self, experience: Experience, update: Update) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's micro-batches of one minibatch, and whether each needs a backward pass."""
        spared = update.without_gradient
        for backward in (False, True):
            indices = [index for index in update.indices if (index not in spared) == backward]
            for micro in self._planner.plan(experience.pairs, indices) if indices else []:
                yield micro, backward
