"""The DeepSpeed engine: one optimiser step over any number of micro-batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before DeepSpeed is imported: it would otherwise guess, and say so.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from transformers import get_scheduler

from lmcot.config import LearnerSettings, OptimiserSettings
from lmcot.errors import UserError


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step reports."""

    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """That the step was done with."""


class TrainEngine:
    """Gradients accumulate over `backward` calls; `step` clips, updates and clears them.

    The loss that is given to `backward` is already divided by the number of tokens of the whole
    optimiser step, over all micro-batches and ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        parameter_groups: list[dict[str, Any]],
        *,
        optimiser: OptimiserSettings,
        learner: LearnerSettings,
        total_steps: int,
    ) -> None:
        _join_process_group()
        dtype = next(module.parameters()).dtype
        check_stage(learner, dtype)
        self.engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups,
            config=_deepspeed_config(optimiser, learner, dtype),
            lr_scheduler=lambda adam: get_scheduler(
                "linear" if optimiser.decay == "linear" else "constant_with_warmup",
                adam,
                num_warmup_steps=optimiser.warmup_steps,
                num_training_steps=total_steps,
            ),
        )

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.engine.module

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's share of the loss."""
        # DeepSpeed averages over ranks, the loss is already a mean over all of them.
        self.engine.backward(loss * self.engine.world_size, scale_wrt_gas=False)

    def step(self, frozen_groups: tuple[int, ...] = ()) -> StepResult:
        """Clips, updates, advances the schedule and clears the gradients.

        Args:
            frozen_groups: indices of parameter groups that this step leaves as they are.
        """
        groups = self.engine.optimizer.param_groups
        for index in frozen_groups:
            groups[index]["lr"] = 0.0  # the schedule sets it anew after the step
        learning_rate = max(float(group["lr"]) for group in groups)
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        # At ZeRO 0 in float32 DeepSpeed clips, but does not tell the norm.
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
        self.engine.step()
        told = self.engine.get_global_grad_norm()
        norm = told if told is not None else norm
        if norm is None:
            raise RuntimeError("there was no gradient to step with")
        return StepResult(float(norm), learning_rate)

    def save(self, folder: Path, tag: str) -> None:
        """Writes model, optimiser and schedule below ``folder/tag``."""
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Takes up what `save` wrote."""
        path, _ = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint '{tag}' in {folder}")


def check_stage(learner: LearnerSettings, dtype: torch.dtype) -> None:
    """Refuses ZeRO stages that do not add up bfloat16 gradients rightly.

    DeepSpeed 0.19.8 has no float32 accumulation at stage 0, and at stage 1 it adds the first
    micro-batch twice when the number of micro-batches is the caller's.

    Raises:
        UserError: naming the key to change.
    """
    if dtype == torch.bfloat16 and learner.zero_stage < 2:
        raise UserError(
            f"learner.zero_stage is {learner.zero_stage}, but the policy trains in bfloat16, whose "
            "gradients are added up rightly from stage 2 on only: set learner.zero_stage to 2, or "
            "policy.dtype to 'float32'"
        )


def _deepspeed_config(
    optimiser: OptimiserSettings, learner: LearnerSettings, dtype: torch.dtype
) -> dict[str, Any]:
    bf16 = dtype == torch.bfloat16
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Micro-batches vary in number: `step` marks the boundary, not a counter.
        "managed_gradient_accumulation": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimiser.learning_rate,
                "betas": list(optimiser.betas),
                "eps": optimiser.eps,
                "weight_decay": optimiser.weight_decay,
                # DeepSpeed's own Adam multiplies up its bias correction on the CPU but computes
                # it anew after a resume: equal to some 1e-7 only, where torch's is to the bit.
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": {"stage": learner.zero_stage, "overlap_comm": False},
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": optimiser.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _join_process_group() -> None:
    """Makes this process a group of one.

    Its store is in memory: there is no port that another process could take first, or that a
    child process would inherit through the environment.
    """
    if torch.distributed.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
