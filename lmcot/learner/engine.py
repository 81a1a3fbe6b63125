"""The DeepSpeed engine: one optimiser step over any number of micro-batches, ZeRO 0 to 3.

Facts of DeepSpeed 0.19.8 that shape this module, each with a test:
- a micro-batch count that varies needs ``managed_gradient_accumulation: false``;
- bfloat16 gradients add up in float32 at stage 1 only with ``immediate_grad_update``, at stage 0
  only if autograd itself keeps them in float32, and over ranks only with
  ``communication_data_type``;
- in bfloat16 at stage 0 it begins with a step of its own on gradients of zero;
- in float32 at stage 0 it neither reports the norm nor looks for infinities;
- accumulators of offloaded and of stage 3 gradients keep the last step's values for a parameter
  that gets no gradient in the next step, and keep non-finite values after a skipped step;
- stage 3 replaces ``torch.nn.functional.linear`` for the whole process, unless
  ``memory_efficient_linear`` is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lmcot.config import LearnerSettings, OptimiserSettings
from lmcot.errors import UserError
from lmcot.learner.accelerator import deepspeed
from lmcot.learner.build_ops import remove_stale_locks
from lmcot.learner.host_memory import release_free_memory
from lmcot.learner.ranks import join_group, world_size
from lmcot.learner.state_files import StateFiles
from lmcot.models.sequences import SequenceBatch

TAG = "engine"
"""Subfolder (and DeepSpeed tag) of the engine's part of a checkpoint."""

_WHOLE_BELOW = 4000
"""Parameters of fewer elements (norms, biases) are not partitioned at stage 3."""


_BUCKET = 2**23
"""Elements that are reduced or gathered at once, and at stage 3 kept whole between two uses.

DeepSpeed's defaults, of 5e8 and more, hold the whole of a small LM and so save nothing.
"""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step reports."""

    grad_norm: float
    """Global gradient norm before clipping; infinite if the step was not applied."""
    learning_rate: float
    """The highest learning rate of all parameter groups in this step."""
    applied: bool
    """False if a gradient was not finite: parameters, optimiser and schedule are as before."""


class TrainEngine:
    """Gradients accumulate over `backward` calls; `step` clips, updates and clears them.

    The caller divides each loss by the number of tokens of the whole optimiser step, over all
    micro-batches and ranks. All ranks make the same calls, and call `backward` equally often,
    since stages 2 and 3 communicate there.
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
        """Args: parameter_groups: groups of trained parameters; no group may be empty."""
        join_group(0, 1, None, 0.0)  # unless this process is in a group already
        self._bf16 = next(module.parameters()).dtype == torch.bfloat16
        self._stage = learner.zero_stage
        self._skips_allowed = learner.max_skipped_updates
        self._skipped_in_a_row = 0
        self._backwards = 0
        remove_stale_locks()  # initialize() compiles or loads operators
        self.engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=module,
            optimizer=self._adam(parameter_groups, optimiser),
            config=_deepspeed_config(optimiser, learner, self._bf16),
            lr_scheduler=lambda adam: LambdaLR(
                adam, partial(_share_of_rate, settings=optimiser, total_steps=total_steps)
            ),
        )
        self._base_rates = tuple(self.scheduler.base_lrs)
        self._files = self.engine.checkpoint_engine = StateFiles()
        if self._bf16 and self._stage == 0:
            self._begin_at_zero()

    def _adam(
        self, groups: list[dict[str, Any]], settings: OptimiserSettings
    ) -> torch.optim.Optimizer:
        # torch's AdamW resumes to the bit. DeepSpeed's accumulates its bias correction on the CPU
        # but recomputes it after a resume, which differs by some 1e-7.
        options: dict[str, Any] = {
            "lr": settings.learning_rate,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
            "fused": True,
        }
        if self._stage == 0 and not self._bf16:
            return _CheckedAdamW(groups, max_grad_norm=settings.max_grad_norm, **options)
        return torch.optim.AdamW(groups, **options)

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.engine.module

    def forward(
        self, batch: SequenceBatch, *, values: bool, head_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The policy's forward pass."""
        return self.engine(batch, values=values, head_only=head_only)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's share of the loss."""
        # DeepSpeed averages over ranks, but the loss is already a mean over all ranks.
        self.engine.backward(loss * world_size(), scale_wrt_gas=False)
        self._backwards += 1

    def step(self, frozen_groups: tuple[int, ...] = ()) -> StepResult:
        """Clips, updates, advances the schedule and clears the gradients.

        If a gradient is not finite on any rank, only the gradients are cleared.

        Args:
            frozen_groups: indices of parameter groups that this step does not change.

        Raises:
            UserError: if more steps in a row than ``learner.max_skipped_updates`` had gradients
                that were not finite.
        """
        if not self._backwards:
            raise RuntimeError("there was no gradient to step with")
        self._backwards = 0
        groups = self.engine.optimizer.param_groups
        scheduled = [float(group["lr"]) for group in groups]
        for index in frozen_groups:
            groups[index]["lr"] = 0.0  # the schedule sets it again after the step
        learning_rate = max(float(group["lr"]) for group in groups)
        if self._bf16 and self._stage == 0:
            self._fill_missing_gradients()
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        if not applied:  # the schedule did not advance either
            for group, rate in zip(groups, scheduled, strict=True):
                group["lr"] = rate
        self._clear_accumulators()
        self._count_skips(applied)
        release_free_memory()
        norm = float(self.engine.get_global_grad_norm())
        return StepResult(norm if applied else float("inf"), learning_rate, applied)

    def _count_skips(self, applied: bool) -> None:
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row > self._skips_allowed:
            raise UserError(
                f"{self._skipped_in_a_row} updates in a row had a loss or gradient that is not "
                "finite, more than learner.max_skipped_updates allows: lower the learning rate, "
                "and resume from the last checkpoint"
            )

    def whole_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters of a part of the module, each one whole, one at a time.

        At stage 3 all ranks gather each parameter, so all must iterate to the end. A tensor is
        valid until the next one is requested.
        """
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            gather = self._stage == 3
            with deepspeed.zero.GatheredParameters([parameter]) if gather else nullcontext():
                yield name, parameter.detach()

    @property
    def updates(self) -> int:
        """Number of updates applied so far, including those before a resume."""
        return int(self.scheduler.last_epoch)

    def save(self, folder: Path) -> dict[str, str]:
        """Writes trained parameters, optimiser and schedule below ``folder``.

        Returns:
            the digest of each file that this rank wrote, by its path relative to ``folder``.
        """
        self._files.begin(folder)
        self.engine.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True
        )
        return self._files.digests()

    def load(self, folder: Path) -> None:
        """Loads what `save` wrote.

        Raises:
            UserError: if a file is damaged, or holds more than data.
        """
        self._files.begin(folder)
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint '{TAG}' in {folder}")
        self._use_present_rates()

    def _use_present_rates(self) -> None:
        """Sets the learning rates that the settings ask for, at the schedule's present step.

        A checkpoint brings those that it was written with.
        """
        self.scheduler.base_lrs = list(self._base_rates)
        step = self.scheduler.last_epoch
        groups = self.engine.optimizer.param_groups
        for group, rate, share in zip(
            groups, self._base_rates, self.scheduler.lr_lambdas, strict=True
        ):
            group["initial_lr"] = rate
            group["lr"] = rate * share(step)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.engine.module.parameters() if p.requires_grad]

    def _begin_at_zero(self) -> None:
        """Undoes DeepSpeed's own first step, and lets autograd add up in float32."""
        self.optimizer.optimizer.state.clear()
        self.optimizer.refresh_fp32_params()
        for parameter in self._trained():
            parameter.grad = None
            parameter.grad_dtype = torch.float32

    def _fill_missing_gradients(self) -> None:
        # DeepSpeed would make bfloat16 ones, which do not fit beside the float32 ones.
        for parameter in self._trained():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)

    def _clear_accumulators(self) -> None:
        zero: Any = self.optimizer
        masters: list[Tensor] = []
        if self._stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
            if zero.offload_optimizer:
                masters = zero.fp32_partitioned_groups_flat
        elif self._stage and getattr(zero, "cpu_offload", False):
            masters = zero.single_partition_of_fp32_groups
            for kept in zero.accumulated_grads_in_cpu.values():
                kept.zero_()
            for index in zero.averaged_gradients:
                zero.averaged_gradients[index] = None
        for master in masters:
            if master.grad is not None:
                master.grad.zero_()


class _CheckedAdamW(torch.optim.AdamW):
    """AdamW that clips, reports the norm, and does nothing if the norm is not finite.

    DeepSpeed reads ``overflow`` and ``_global_grad_norm`` from any optimiser, as its own ZeRO
    optimisers have them.
    """

    def __init__(self, groups: Any, *, max_grad_norm: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self._max_grad_norm = max_grad_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update with the present gradients."""
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.overflow = not bool(torch.isfinite(norm))
        self._global_grad_norm = float(norm)
        if self.overflow:
            return
        torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        super().step(closure)


def _share_of_rate(step: int, settings: OptimiserSettings, total_steps: int) -> float:
    """Factor of the learning rate at a step (from 0): the warm-up, then the decay.

    No step has rate 0: neither the first of a warm-up, which would be wasted, nor the last.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = max(0.0, (total_steps - step) / max(1, total_steps - warmup))
    if settings.decay == "linear":
        return left
    if settings.decay == "cosine":
        return (1.0 - math.cos(math.pi * left)) / 2
    return 1.0


def _deepspeed_config(
    optimiser: OptimiserSettings, learner: LearnerSettings, bf16: bool
) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": learner.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if learner.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = _BUCKET
        zero["stage3_max_live_parameters"] = _BUCKET
        zero["stage3_max_reuse_distance"] = _BUCKET
        zero["memory_efficient_linear"] = False
        zero["stage3_param_persistence_threshold"] = _WHOLE_BELOW
    if learner.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if learner.offload == "optimiser_and_parameters":
        zero["offload_param"] = {"device": "cpu"}
    own_clipping = learner.zero_stage == 0 and not bf16
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16, "immediate_grad_update": True, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and learner.zero_stage == 0 else "fp32"},
        "gradient_clipping": 0.0 if own_clipping else optimiser.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
