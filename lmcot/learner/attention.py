"""The kernel of a learner's attention: set, restored from a checkpoint, or chosen by a trial."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lmcot.config import Kernel, LearnerSettings
from lmcot.errors import UserError
from lmcot.files import read_object, write_atomically
from lmcot.learner.attention_choice import TRIED_FROM, fastest_kernel, shape_of
from lmcot.learner.batching import TokenPair
from lmcot.learner.checkpoints import check_content
from lmcot.models.attention import KERNELS, can_cut, use_kernel
from lmcot.models.policy import shares_prompts
from lmcot.models.sources import count_parameters

ATTENTION = "attention.json"
"""File of a checkpoint that says which kernel the stage began with."""


class Attention:
    """Sets the kernel of all models of a learner.

    An automatic choice waits for the first step, whose lengths it needs. It is then part of the
    stage's checkpoints, because kernels differ by rounding.
    """

    def __init__(
        self, models: Sequence[nn.Module], settings: LearnerSettings, *, shared: bool
    ) -> None:
        """Call it before the engine partitions the models.

        Args:
            models: the policy's, the reference's and a critic's own.
            shared: whether rationales share their prompt.

        Raises:
            UserError: if the settings ask for a kernel that a model does not take.
        """
        self._models = models
        self._settings = settings
        self.kernel: Kernel = "model"
        self._decided = True
        if not shared or settings.attention == "model":
            return
        automatic = settings.attention == "auto"
        if automatic and not self._worth_a_trial():
            return
        if not all(_works_in_parts(model) for model in models):
            if automatic:
                return
            raise UserError(
                f"learner.attention is '{settings.attention}', but the attention of "
                f"{type(models[0]).__name__} cannot be computed in parts: set it to 'auto' or "
                "'model'"
            )
        if settings.attention == "auto":
            self._decided = False
        else:
            self._use(settings.attention)

    def choose(self, pairs: Sequence[TokenPair]) -> None:
        """Makes an automatic choice, once, for the lengths of a step's prompts and responses."""
        if self._decided:
            return
        shape = shape_of(self._models[0], pairs, self._settings.tokens_per_micro_batch)
        if shape is not None:
            self._use(fastest_kernel(shape))

    def write(self, folder: Path) -> None:
        """Writes the kernel into a checkpoint; null if it is still to be chosen."""
        content = {"kernel": self.kernel if self._decided else None}
        write_atomically(folder / ATTENTION, json.dumps(content))

    def restore(self, folder: Path) -> None:
        """Takes the kernel of a checkpoint where the settings leave the choice.

        Checkpoints of earlier versions were written with the model's own.

        Raises:
            UserError: if the file is damaged.
        """
        if self._decided:
            return
        file = folder / ATTENTION
        if not file.exists():
            self._use("model")
            return
        check_content(folder, ATTENTION)
        remedy = "delete the checkpoint to resume from the one before"
        name = read_object(file, remedy).get("kernel", "")
        if name is None:
            return
        if name not in KERNELS:
            raise UserError(f"the file '{file}' is damaged (it names no kernel): {remedy}")
        self._use(name)

    def _worth_a_trial(self) -> bool:
        models: list[Any] = list(self._models)
        return (
            not self._settings.gradient_checkpointing
            and models[0].device.type == "cpu"
            and count_parameters(models[0]) >= TRIED_FROM
        )

    def _use(self, kernel: Kernel) -> None:
        for model in self._models:
            use_kernel(model, kernel)
        self.kernel, self._decided = kernel, True


def _works_in_parts(model: Any) -> bool:
    """Whether a model in parts gives what it gives by itself; leaves it as it was."""
    if not can_cut(model):
        return False
    use_kernel(model, "fused")
    try:
        return shares_prompts(model, None)  # compares it with rows that are not cut
    finally:
        use_kernel(model, "model")
