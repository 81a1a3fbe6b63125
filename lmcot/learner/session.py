"""A learner set up for one stage: models, engine and what trains with them."""

from __future__ import annotations

import copy
import random
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from lmcot.config import Config
from lmcot.learner.checkpoints import ENGINE
from lmcot.learner.distiller import Distiller
from lmcot.learner.engine import TrainEngine
from lmcot.learner.ppo import PPO
from lmcot.models.policy import Policy, disable_dropout
from lmcot.models.sources import load_model, save_model
from lmcot.records import RunState


class LearnerSession:
    """Everything that one process needs to distil or to run PPO."""

    def __init__(
        self,
        config: Config,
        stage: Literal["distill", "refine"],
        source: str,
        total_steps: int,
    ) -> None:
        """Loads the models and starts the engine.

        Args:
            source: where the policy starts; in ``refine`` the reference too.
            total_steps: steps of the stage (PPO steps in ``refine``).
        """
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        self._config = config
        self._stage = stage
        lm, self._tokenizer = load_model(source, config.policy.dtype)
        disable_dropout(lm)
        self._reference = copy.deepcopy(lm).requires_grad_(False) if stage == "refine" else None
        if config.learner.gradient_checkpointing:
            lm.gradient_checkpointing_enable()
        self.policy = Policy(lm.train(), seed=config.seed)
        refine = config.refine
        optimiser = config.distill.optimiser if stage == "distill" else refine.optimiser
        updates = 1 if stage == "distill" else refine.epochs * refine.minibatches
        groups = [{"params": list(lm.parameters())}]
        if stage == "refine":
            groups.append({"params": list(self.policy.value_head.parameters())})
        else:
            self.policy.value_head.requires_grad_(False)
        self._engine = TrainEngine(
            self.policy,
            groups,
            optimiser=optimiser,
            learner=config.learner,
            total_steps=total_steps * updates,
        )

    @cached_property
    def distiller(self) -> Distiller:
        """Trains on rationales."""
        return Distiller(
            self.policy,
            self._engine,
            pad_id=self._tokenizer.pad_token_id,
            micro_batch_size=self._config.learner.micro_batch_size,
        )

    @cached_property
    def ppo(self) -> PPO:
        """Trains on rewards.

        Raises:
            RuntimeError: if the session was not opened for ``refine``.
        """
        if self._reference is None:
            raise RuntimeError("this learner was set up to distil: it has no reference model")
        return PPO(
            self.policy,
            self._reference,
            self._engine,
            self._config.refine,
            temperature=self._config.policy.temperature,
            pad_id=self._tokenizer.pad_token_id,
            micro_batch_size=self._config.learner.micro_batch_size,
            seed=self._config.seed,
        )

    def save_engine(self, folder: Path) -> None:
        """Writes the engine's part of a checkpoint below ``folder``."""
        self._engine.save(folder, ENGINE)

    def restore(self, folder: Path, state: RunState) -> None:
        """Takes up a checkpoint: the engine's part, and the KL controller's."""
        self._engine.load(folder, ENGINE)
        if self._stage == "refine":
            self.ppo.kl_controller.restore(state.kl_controller)

    def export(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder that plain transformers loads."""
        save_model(self.policy.lm, self._tokenizer, folder)
