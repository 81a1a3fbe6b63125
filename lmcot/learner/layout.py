"""What must agree between a checkpoint and the learners that load it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lmcot.config import Config
from lmcot.errors import UserError
from lmcot.learner.checkpoints import check_content
from lmcot.storage import reaching

if TYPE_CHECKING:
    from lmcot.storage import Place

LAYOUT = "layout.json"
_KEYS = {
    "learners": "actors.learner.count",
    "zero_stage": "learner.zero_stage",
    "offload": "learner.offload",
    "dtype": "policy.dtype",
}
"""The setting behind each field; the other fields describe the model."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the engine's state is partitioned, and which parameters it belongs to."""

    learners: int
    zero_stage: int
    offload: str
    dtype: str
    parameters: str
    """Digest of the names and shapes of the trained parameters."""

    def write(self, folder: Path) -> None:
        """Writes the layout into a checkpoint."""
        (folder / LAYOUT).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def layout_of(config: Config, policy: nn.Module) -> Layout:
    """The layout of this configuration with this model (before or after partitioning)."""
    shapes = [
        f"{name}:{tuple(getattr(parameter, 'ds_shape', parameter.shape))}"
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    ]
    return Layout(
        learners=config.actors.learner.count,
        zero_stage=config.learner.zero_stage,
        offload=config.learner.offload,
        dtype=str(next(policy.parameters()).dtype).removeprefix("torch."),
        parameters=hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16],
    )


def check_layout(folder: Place, now: Layout) -> None:
    """Compares a checkpoint with the learner that would load it.

    Raises:
        UserError: naming the setting to restore, or saying that the model is another one.
    """
    _compare(folder, asdict(now))


def check_settings(folder: Place, config: Config) -> None:
    """The part of `check_layout` that needs no model, for use before any actor starts.

    Raises:
        UserError: naming the setting to restore.
    """
    now = {
        "learners": config.actors.learner.count,
        "zero_stage": config.learner.zero_stage,
        "offload": config.learner.offload,
    }
    _compare(folder, now)


def _compare(folder: Place, now: dict[str, Any]) -> None:
    try:
        with reaching(folder):
            check_content(folder, LAYOUT)
            text = (folder / LAYOUT).read_text(encoding="utf-8")
        before = dict(json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the checkpoint '{folder}' is damaged ({LAYOUT}: {error}): delete it to resume "
            "from the one before"
        ) from None
    for name, value in now.items():
        if before.get(name) == value:
            continue
        if name in _KEYS:
            raise UserError(
                f"the checkpoint '{folder}' was written with {_KEYS[name]} {before.get(name)!r}, "
                f"not {value!r}: DeepSpeed's state fits only that, so restore it"
            )
        raise UserError(
            f"the checkpoint '{folder}' is of another model (its {name} differ): use "
            "another --run-dir"
        )
