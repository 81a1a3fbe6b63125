"""One rank of the learner as a Ray actor: trains in one stage, and publishes its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmcot.actors.base import ActorBase
from lmcot.actors.kept import Kept, fetch
from lmcot.actors.units import Packed, WeightsRef
from lmcot.actors.weights import Weights, pack_weights
from lmcot.config import Config, Kernel
from lmcot.learner.plan import LearnerPlan
from lmcot.process import use_threads
from lmcot.records import RunState, ScoredRollout
from lmcot.storage import added_to, fetched_part, forget, is_remote, persistently, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcot.learner.batching import TokenPair


@dataclass(frozen=True, slots=True)
class DistillMetrics:
    """What the learners measured in one step of distillation; the same on every rank."""

    loss: float
    tokens: float
    """Tokens of the batch that went through the model."""
    values: dict[str, float]
    """All metrics by the names under which they are logged."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What the learners measured in one PPO step, and what it left; the same on every rank."""

    kl: float
    """KL divergence from the reference model."""
    tokens: float
    """Tokens of the batch that went through the model."""
    values: dict[str, float]
    """All metrics by the names under which they are logged."""
    kl_controller: dict[str, float]
    """State of the KL controller after the step, for the checkpoint."""
    reward_statistics: dict[str, float]
    """State of the reward scale after the step, for the checkpoint."""
    attention: Kernel = "model"
    """The kernel of the attention (`learner.attention`) that the step was learnt with."""


class LearnerActor(ActorBase):
    """Owns its rank's share of the DeepSpeed engine; each call is made on all ranks together."""

    def __init__(self, config: Config, plan: LearnerPlan, rank: int) -> None:
        use_threads(config.actors.learner.threads)
        self._config = config
        self._plan = plan
        self._rank = rank
        self._fetched: list[Packed[list[ScoredRollout]]] = []
        """What the next step learns from."""

    def meeting(self) -> tuple[str, int]:
        """Opens the address where the ranks meet, on rank 0's node."""
        from lmcot.learner.ranks import host_meeting

        return host_meeting()

    def setup(self, meeting: tuple[str, int] | None) -> None:
        """Joins the other ranks, loads the models and starts the engine."""
        from lmcot.learner.ranks import join_group
        from lmcot.learner.session import LearnerSession

        actors = self._config.actors
        join_group(self._rank, actors.learner.count, meeting, actors.start_timeout_s)
        self._session = LearnerSession(self._config, self._plan)

    def shares_prompts(self) -> bool:
        """Whether a question's rationales share one copy of its prompt in the model."""
        return self._session.shares_prompts

    def distill_step(
        self, rationales: list[TokenPair], answers: list[TokenPair], answer_weight: float
    ) -> DistillMetrics:
        """Takes one optimiser step of distillation."""
        values = self._session.distiller.step(rationales, answers, answer_weight)
        return DistillMetrics(values["loss"], values["batch/tokens"], values)

    def validate(self, rationales: list[TokenPair], answers: list[TokenPair]) -> dict[str, float]:
        """The losses of what is not learnt from, by the names under which a step logs its own."""
        return self._session.distiller.validate(rationales, answers)

    def write_greedily(self, prompts: list[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Greedy rationales by the present weights, on rank 0; the others return none."""
        return self._session.write_greedily(prompts, max_new_tokens)

    def fetch(self, units: list[Kept[Packed[list[ScoredRollout]]]]) -> list[int]:
        """Fetches what the next step learns from; returns which of the units are lost."""
        found = fetch(units)
        self._fetched = [one for one in found if one is not None]
        return [number for number, one in enumerate(found) if one is None]

    def ppo_step(self, scored: list[Packed[list[ScoredRollout]]] | None, step: int) -> StepMetrics:
        """Takes one PPO step on all rationales of the given units.

        Args:
            scored: the units; None: those that it fetched.
            step: how many steps come before it.
        """
        if scored is None:
            scored, self._fetched = self._fetched, []
        ppo, attention = self._session.ppo, self._session.attention
        batch = [one for unit in scored for one in unit.open()]
        attention.choose([(one.rollout.prompt_ids, one.rollout.response_ids) for one in batch])
        values = ppo.step(batch, step)
        return StepMetrics(
            kl=values["kl"],
            tokens=values["batch/tokens"],
            values=values,
            kl_controller=ppo.kl_controller.state(),
            reward_statistics=ppo.reward_scale.state(),
            attention=attention.kernel,
        )

    def publish(self, version: int) -> WeightsRef:
        """Puts the trained weights into the object store; only rank 0 does, others return ()."""
        import ray

        weights = self._weights(version)
        return (ray.put(weights),) if weights is not None else ()

    def checksum(self) -> int | None:
        """Checksum of the policy's trained tensors, on rank 0."""
        weights = self._weights(0)
        return weights.checksum if weights is not None else None

    def _weights(self, version: int) -> Weights | None:
        tensors = self._session.trained_tensors()
        if self._rank == 0:
            return pack_weights(tensors, self._session.trained_bytes(), version)
        for _ in tensors:
            pass  # this rank only takes part in the gathering
        return None

    def updates(self) -> int:
        """Number of updates since the stage began that were applied, not skipped."""
        return self._session.updates()

    def save_engine(self, folder: str) -> dict[str, str]:
        """Writes this rank's share of a checkpoint; returns the digests of its files by name."""
        self._check_owner()
        with added_to(place(folder), before=self._check_owner) as local:
            return self._session.save_engine(local)

    def restore(self, folder: str, state: RunState) -> None:
        """Loads a checkpoint.

        From a URL each rank fetches what it reads; the ranks of one node fetch a file once, and
        `forget` it later.
        """
        from lmcot.learner.state_files import reads

        where = place(folder)
        if is_remote(where):
            where = persistently(partial(fetched_part, where, partial(reads, rank=self._rank)))
        self._session.restore(where, state)

    def forget(self, folder: str) -> None:
        """Removes this node's copy of a checkpoint that every rank has loaded."""
        where = place(folder)
        if is_remote(where):
            forget(where)

    def export(self, folder: str, critic: str | None = None) -> None:
        """Writes the policy as a Hugging Face folder, or its adapters; rank 0 does."""
        self._check_owner()
        self._session.export(
            place(folder), place(critic) if critic else None, before=self._check_owner
        )

    def _check_owner(self) -> None:
        """Checks that the driver still owns the run; raises as `Claim.check_persistently` does."""
        if self._plan.claim is not None:
            self._plan.claim.check_persistently()
