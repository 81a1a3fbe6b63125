"""One PPO step: from scored rationales to an updated policy (Schulman et al. 2017).

Three log-probabilities of each token play a part: *behaviour* (the sampler's), *proximal* (the
learner's at the start of the step) and *current*. The ratio is current / proximal; one truncated
importance weight, proximal / behaviour, corrects for how the sampler differs from the learner. In a
step's first update current is proximal: a step that has no other need not score its rationales
before (`ExperienceMaker.policy_pass`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lmcot.config import Gae, RefineSettings
from lmcot.learner import maths
from lmcot.learner.batching import BatchPlanner, MicroBatch, split_evenly
from lmcot.learner.engine import StepResult, TrainEngine
from lmcot.learner.experience import Experience, ExperienceMaker, Reference, usable
from lmcot.learner.kl_control import KlController
from lmcot.learner.ranks import max_over_ranks, sum_over_ranks
from lmcot.learner.reward_scale import RewardScale
from lmcot.records import ScoredRollout

POLICY_GROUP = 0
"""Index of the policy's parameters among the engine's groups; the critic's follow."""


class PPO:
    """Learns one batch at a time; every rank calls it with the whole batch."""

    def __init__(
        self,
        engine: TrainEngine,
        reference: Reference,
        planner: BatchPlanner,
        settings: RefineSettings,
        *,
        temperature: float,
        seed: int,
    ) -> None:
        self._engine = engine
        self._planner = planner
        self._settings = settings
        self._temperature = temperature
        self._seed = seed
        self._maker = ExperienceMaker(engine, reference, planner, settings, temperature)
        self.kl_controller = KlController(settings.kl)
        self.reward_scale = RewardScale()

    def step(self, scored: Sequence[ScoredRollout], step: int) -> dict[str, float]:
        """Learns one batch; ``step`` counts from 0. Returns the step's metrics.

        Raises:
            ValueError: if no rationale of the batch can be learnt from.
        """
        advantage = self._settings.advantage
        batch = usable(scored, in_groups=not isinstance(advantage, Gae))
        if not batch:
            raise ValueError(
                f"none of the step's {len(scored)} rationales can be learnt from: they are empty, "
                "or the only ones of their question"
            )
        warming = isinstance(advantage, Gae) and step < advantage.critic_warmup_steps
        scores = self._scores(batch)
        experience = self._maker.make(batch, scores, self.kl_controller.coefficient)
        updates = self._update(experience, step, warming)
        if not self._maker.policy_pass:
            experience.proximal = sum_over_ranks(experience.proximal)
        metrics = self._maker.metrics(experience, batch, scores)
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

    def _update(self, experience: Experience, step: int, warming: bool) -> dict[str, float]:
        """All optimiser steps on one batch; returns means of their metrics over tokens."""
        totals: dict[str, float] = {}
        extremes: list[Tensor] = []
        results: list[StepResult] = []
        tokens_seen, stopped_early = 0.0, False
        for minibatch in self._minibatches(experience, step):
            tokens = float(experience.mask[minibatch].sum())
            sums, extreme = self._accumulate(experience, minibatch, tokens, warming)
            extremes.append(extreme)
            frozen = (POLICY_GROUP,) if warming else ()
            results.append(self._engine.step(frozen))
            tokens_seen += tokens
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
            "policy/ratio_min": math.exp(-least),
            "policy/ratio_max": math.exp(greatest),
            "optimiser/grad_norm": sum(r.grad_norm for r in applied) / max(len(applied), 1),
            "optimiser/learning_rate": results[-1].learning_rate,
            "optimiser/updates": float(len(applied)),
            "optimiser/skipped_updates": float(len(results) - len(applied)),
            "optimiser/stopped_early": float(stopped_early),
        }

    def _minibatches(self, experience: Experience, step: int) -> list[list[int]]:
        """Indices of each optimiser step: questions in a new order each pass, each one whole
        where the number of minibatches admits it."""
        questions: dict[tuple[int, ...], list[int]] = {}
        for index, (prompt, _) in enumerate(experience.pairs):
            questions.setdefault(tuple(prompt), []).append(index)
        minibatches: list[list[int]] = []
        for epoch in range(self._settings.epochs):
            order = list(questions.values())
            random.Random(f"{self._seed}/{step}/{epoch}").shuffle(order)
            indices = [index for members in order for index in members]
            parts = split_evenly(indices, self._settings.minibatches)
            # In order: a minibatch of the whole step is cut as it was when it was scored.
            minibatches.extend(sorted(part) for part in parts)
        return minibatches

    def _accumulate(
        self, experience: Experience, minibatch: list[int], tokens: float, warming: bool
    ) -> tuple[dict[str, float], Tensor]:
        """Backward passes over one minibatch.

        Returns:
            sums over the tokens of all ranks, and of this rank's log-ratios the greatest, [2]:
            of the negated ones, and of all as they are.
        """
        sums: dict[str, Tensor] = {}
        extreme = torch.full((2,), -math.inf)
        for micro in self._planner.plan(experience.pairs, minibatch):
            loss, parts, log_ratios = self._loss(experience, micro, warming)
            self._engine.backward(loss * (micro.counted / tokens))
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros(())) + value * micro.counted
            if micro.counted:
                found = torch.stack([-log_ratios.min(), log_ratios.max()]).cpu()
                extreme = torch.maximum(extreme, found)
        added = sum_over_ranks(torch.stack(list(sums.values())).cpu().double())
        return dict(zip(sums, added.tolist(), strict=True)), extreme

    def _loss(
        self, experience: Experience, micro: MicroBatch, warming: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss summed over the tokens of a micro-batch, its parts likewise, and the log-ratios."""
        settings = self._settings
        batch = self._planner.lay_out(experience.pairs, micro)
        logits, values = self._engine.forward(batch, values=True, head_only=warming)
        cells = experience.cells(micro.indices)

        def of(tensor: Tensor) -> Tensor:
            return tensor[cells].to(logits.device)

        logprobs = maths.token_logprobs(logits, batch.targets.to(logits.device), self._temperature)
        if self._maker.policy_pass:
            proximal = of(experience.proximal)
        else:
            proximal = logprobs.detach()
            if micro.counted:
                experience.proximal[cells] = proximal.cpu()
        weight = maths.importance_weight(
            proximal, of(experience.behaviour), settings.importance_cap
        )
        policy, clipped = maths.policy_loss(
            logprobs, proximal, of(experience.advantages), settings.clip, settings.dual_clip
        )
        policy = policy * weight
        entropy = self._entropy(logits)
        total = policy - settings.entropy_coefficient * entropy
        if settings.kl.apply_to == "loss":
            penalty = maths.kl_k2(logprobs, of(experience.reference))
            total = total + self.kl_controller.coefficient * penalty
        if warming:
            # The zero keeps a gradient (of zeros) on the trunk, which the engine expects.
            total = 0.0 * policy
        parts = {"loss/policy": policy, "policy/entropy": entropy, "policy/clip_fraction": clipped}
        if values is not None and isinstance(settings.advantage, Gae):
            gae = settings.advantage
            value = maths.value_loss(
                values, of(experience.values), of(experience.returns), gae.value_clip
            )
            total = total + gae.value_coefficient * value
            parts["loss/value"] = value
        parts["policy/approx_kl"] = maths.kl_k3(proximal, logprobs)
        log_ratios = (logprobs.detach() - proximal).clamp(
            -maths.LOG_RATIO_BOUND, maths.LOG_RATIO_BOUND
        )
        return total.sum(), {n: part.detach().sum() for n, part in parts.items()}, log_ratios

    def _entropy(self, logits: Tensor) -> Tensor:
        """[tokens]; tracked by autograd only if it is part of the loss."""
        with torch.set_grad_enabled(self._settings.entropy_coefficient > 0):
            return maths.token_entropy(logits, self._temperature)
