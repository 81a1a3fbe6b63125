"""The learner as a Ray actor: distils, then runs PPO, and publishes its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmcot.actors.base import ActorBase, prepare_process
from lmcot.actors.weights import checksum, pack_weights
from lmcot.config import Config
from lmcot.records import RunState, ScoredRollout

if TYPE_CHECKING:
    from lmcot.learner.distiller import TokenPair


@dataclass(frozen=True, slots=True)
class LearnerPlan:
    """What a learner is started for."""

    stage: Literal["distill", "refine"]
    source: str
    """Model source that the stage starts from; in ``refine`` it is the reference too."""
    total_steps: int
    """Steps of the stage, for the learning rate's schedule."""


class LearnerActor(ActorBase):
    """Owns the DeepSpeed engine, the policy, the reference and the KL controller."""

    def __init__(self, config: Config, plan: LearnerPlan) -> None:
        prepare_process(config.actors.learner.threads)
        self._config = config
        self._plan = plan

    def setup(self) -> None:
        """Loads the models and starts the engine."""
        from lmcot.learner.session import LearnerSession

        plan = self._plan
        self._session = LearnerSession(self._config, plan.stage, plan.source, plan.total_steps)

    def distill_step(self, pairs: list[TokenPair]) -> dict[str, float]:
        """One optimiser step of distillation."""
        return self._session.distiller.step(pairs)

    def ppo_step(self, scored: list[ScoredRollout], step: int) -> dict[str, float]:
        """One PPO step."""
        return self._session.ppo.step(scored, step)

    def publish(self, version: int) -> list[Any]:
        """Puts the policy's weights into the object store.

        Returns:
            One object reference, in a list so that Ray does not resolve it on the way.
        """
        import ray

        return [ray.put(pack_weights(self._session.policy.lm, version))]

    def checksum(self) -> int:
        """Checksum of the policy's weights."""
        return checksum(self._session.policy.lm)

    def save_engine(self, folder: str) -> None:
        """Writes the engine's part of a checkpoint."""
        self._session.save_engine(Path(folder))

    def restore(self, folder: str, state: RunState) -> None:
        """Takes up a checkpoint."""
        self._session.restore(Path(folder), state)

    def kl_state(self) -> dict[str, float]:
        """State of the KL controller."""
        return self._session.ppo.kl_controller.state()

    def export(self, folder: str) -> None:
        """Writes the policy as a Hugging Face folder."""
        self._session.export(Path(folder))
