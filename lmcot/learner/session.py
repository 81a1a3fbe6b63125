"""A learner that is set up for one stage: its models, its engine, and what trains them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmcot.config import Config
from lmcot.config.training import CriticBaseline
from lmcot.errors import UserError
from lmcot.learner.attention import ATTENTION, Attention
from lmcot.learner.batching import BatchPlanner
from lmcot.learner.checkpoints import digest_of
from lmcot.learner.distiller import Distiller
from lmcot.learner.engine import TrainEngine
from lmcot.learner.experience import Forward
from lmcot.learner.layout import LAYOUT, Layout, check_layout, layout_of
from lmcot.learner.plan import LearnerPlan
from lmcot.learner.ppo import PPO
from lmcot.learner.ranks import rank
from lmcot.learner.writer import Writer
from lmcot.models.adapters import adapters_off, add_adapters, has_adapters, save_adapters
from lmcot.models.compiled import compile_parts
from lmcot.models.policy import (
    Policy,
    critic_model,
    disable_dropout,
    response_logits,
    shares_prompts,
    value_head,
)
from lmcot.models.sequences import SequenceBatch
from lmcot.models.sources import device, load_model, load_tokenizer, save_model, save_tensors
from lmcot.records import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmcot.storage import Place


class LearnerSession:
    """What one rank needs to distil or to run PPO."""

    def __init__(self, config: Config, plan: LearnerPlan) -> None:
        """Loads the models and starts the engine; all ranks together."""
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        self._config = config
        self._plan = plan
        lm, self._tokenizer = load_model(plan.source, config.policy.dtype)
        disable_dropout(lm)
        critic = self._critic(lm)
        self._reference: PreTrainedModel | None = None
        if plan.ppo is not None and config.policy.lora is None:
            self._reference = copy.deepcopy(lm).requires_grad_(False)
            if config.learner.offload_reference:
                self._reference.cpu()
        if config.policy.lora is not None:
            lm = add_adapters(lm, config.policy.lora, config.seed)
        self.policy = Policy(lm, critic)
        readers = [lm] if critic is None or isinstance(critic, nn.Linear) else [lm, critic]
        self.shares_prompts = config.learner.share_prompts and all(
            shares_prompts(model, self.policy.start_id) for model in readers
        )
        models = [*readers, *([self._reference] if self._reference is not None else [])]
        self.attention = Attention(models, config.learner, shared=self.shares_prompts)
        if config.learner.compile:
            compile_parts(models)
        if config.learner.gradient_checkpointing:
            _enable_checkpointing(lm)
            if critic is not None and not isinstance(critic, nn.Linear):
                _enable_checkpointing(critic)
        self._engine = self._start_engine(plan)

    def _critic(self, lm: PreTrainedModel) -> nn.Module | None:
        """The critic that PPO's settings ask for; None without PPO or with a group baseline."""
        baseline = self._baseline
        if baseline is None:
            return None
        if not baseline.critic.own_trunk:
            return value_head(lm, self._config.seed)
        source = baseline.critic.source
        if source is None:
            return critic_model(lm, self._config.seed)
        if load_tokenizer(source).get_vocab() != self._tokenizer.get_vocab():
            raise UserError(
                f"refine.advantage.critic.source is '{source}', whose tokenizer is not the "
                "policy's: a critic reads the policy's token ids, so give a model of the same "
                "family, or none"
            )
        other, _ = load_model(source, self._config.policy.dtype)
        if other.config.is_encoder_decoder != lm.config.is_encoder_decoder:
            raise UserError(
                f"refine.advantage.critic.source is '{source}', but only one of it and the policy "
                "has an encoder: give a model of the same family, or none"
            )
        disable_dropout(other)
        return critic_model(other, self._config.seed)

    @property
    def _baseline(self) -> CriticBaseline | None:
        """How the critic is trained; None if there is none."""
        ppo = self._plan.ppo
        return ppo.advantage.critic_baseline if ppo is not None else None

    def _start_engine(self, plan: LearnerPlan) -> TrainEngine:
        optimiser, ppo = plan.optimiser, plan.ppo
        updates = ppo.epochs * ppo.minibatches if ppo is not None else 1
        groups: list[dict[str, Any]] = [{"params": _trainable(self.policy.lm)}]
        baseline = self._baseline
        if self.policy.critic is not None and baseline is not None:
            rate = baseline.critic.learning_rate
            groups.append(
                {
                    "params": _trainable(self.policy.critic),
                    "lr": rate or optimiser.learning_rate,
                }
            )
        return TrainEngine(
            self.policy.train(),
            groups,
            optimiser=optimiser,
            learner=self._config.learner,
            total_steps=plan.total_steps * updates,
        )

    @cached_property
    def _planner(self) -> BatchPlanner:
        return BatchPlanner(
            pad_id=self._tokenizer.pad_token_id,
            start_id=self.policy.start_id,
            budget=self._config.learner.tokens_per_micro_batch,
            share=self.shares_prompts,
        )

    @cached_property
    def distiller(self) -> Distiller:
        """Trains on rationales."""
        return Distiller(self._engine, self._planner)

    @cached_property
    def ppo(self) -> PPO:
        """Trains on rewards.

        Raises:
            RuntimeError: if the session was not opened for PPO.
        """
        if self._plan.ppo is None:
            raise RuntimeError(
                f"this learner was set up for '{self._plan.stage}', which does no PPO: it has no "
                "reference model"
            )
        return PPO(
            self._engine,
            self._reference_ready,
            self._planner,
            self._plan.ppo,
            temperature=self._config.policy.temperature,
            max_new_tokens=self._config.policy.max_new_tokens,
            seed=self._config.seed,
        )

    @contextmanager
    def _reference_ready(self) -> Iterator[Forward]:
        """The policy as it was when the stage began: without its adapters, or a frozen copy."""
        if self._reference is None:
            with adapters_off(self.policy.lm):
                yield lambda batch: self._engine.forward(batch, values=False)[0]
            return
        reference = self._reference
        if self._config.learner.offload_reference:
            reference.to(device())

        def forward(batch: SequenceBatch) -> Tensor:
            return response_logits(reference, batch)[0]

        yield forward
        if self._config.learner.offload_reference:
            reference.cpu()

    def trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's trained parameters, whole, one after another; all ranks together.

        Names are those of the language model's own parameters: of all, or of its adapters.
        """
        return self._engine.whole_parameters(self.policy.lm)

    def write_greedily(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Greedy texts by the present weights, on rank 0; the others only take part."""
        tensors = self.trained_tensors()
        if rank() == 0:
            self._writer.take(tensors)
            return self._writer.write(prompts, max_new_tokens)
        for _ in tensors:
            pass
        return []

    @cached_property
    def _writer(self) -> Writer:
        return Writer(self._plan.source, self._config.policy)

    def trained_bytes(self) -> int:
        """Size of all trained tensors in bytes."""
        return sum(
            getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            for parameter in _trainable(self.policy.lm)
        )

    def layout(self) -> Layout:
        """Layout that a checkpoint must have to be restored in this session."""
        return layout_of(self._config, self.policy)

    def updates(self) -> int:
        """Number of updates since the stage began that were applied, not skipped."""
        return self._engine.updates

    def save_engine(self, folder: Path) -> dict[str, str]:
        """Writes the engine's part of a checkpoint below ``folder``; all ranks together.

        Returns:
            the digest of each file that this rank wrote, by its name relative to ``folder``.
        """
        digests = self._engine.save(folder)
        if rank() == 0:
            self.layout().write(folder)
            digests[LAYOUT] = digest_of(folder / LAYOUT)
            self.attention.write(folder)
            digests[ATTENTION] = digest_of(folder / ATTENTION)
        return digests

    def restore(self, folder: Path, state: RunState) -> None:
        """Restores a checkpoint: the engine's part, and the states of the controllers.

        Raises:
            UserError: if it was written by a learner of another layout, or is damaged.
        """
        check_layout(folder, self.layout())
        self.attention.restore(folder)
        self._engine.load(folder)
        if self._plan.ppo is not None:
            # A checkpoint from before the first step has neither.
            if state.kl_controller:
                self.ppo.kl_controller.restore(state.kl_controller)
            if state.reward_statistics:
                self.ppo.reward_scale.restore(state.reward_statistics)

    def export(
        self,
        folder: Place,
        critic: Place | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Exports what was trained; all ranks take part, and rank 0 writes.

        Args:
            folder: a Hugging Face folder that plain transformers loads; with adapters, a folder
                in peft's format.
            critic: file for the critic, in safetensors; it is not part of the model.
            before: called on rank 0 before anything is written; what it raises prevents that.
        """
        tensors = self._gathered(self.policy.lm)
        values = self._gathered(self.policy.critic) if self.policy.critic is not None else {}
        if rank() != 0:
            return
        before()
        if has_adapters(self.policy.lm):
            save_adapters(self.policy.lm, tensors, folder)
        else:
            save_model(self.policy.lm, self._tokenizer, folder, tensors)
        if values and critic is not None:
            save_tensors(values, critic)

    def _gathered(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's trained tensors on rank 0; the other ranks only take part."""
        pairs = self._engine.whole_parameters(module)
        return {name: tensor.cpu().clone() for name, tensor in pairs if rank() == 0}


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _enable_checkpointing(lm: Any) -> None:
    lm.gradient_checkpointing_enable({"use_reentrant": False})
