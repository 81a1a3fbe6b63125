"""The files that DeepSpeed keeps its state in: read as data alone, and known by their digests."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from lmcot.errors import UserError
from lmcot.learner.checkpoints import check_content, digest_of

_OWN_TYPES = [LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's states hold beside tensors and plain values; none does more than hold values."""


_SHARE = re.compile(r"zero_pp_rank_(\d+)_")
"""In the name of a file that DeepSpeed has one of for each rank."""


def reads(name: str, rank: int) -> bool:
    """Whether a rank reads a checkpoint's file: it is its own share, or every rank's."""
    share = _SHARE.search(name)
    return share is None or int(share[1]) == rank


class StateFiles(TorchCheckpointEngine):
    """Takes the place of DeepSpeed's own reader, which runs whatever code a pickle names."""

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True
        self._folder = Path()
        self._written: list[Path] = []

    def begin(self, folder: Path) -> None:
        """Sets the checkpoint that is written or read next."""
        self._folder = folder
        self._written.clear()

    def digests(self) -> dict[str, str]:
        """The digest of each file that this rank wrote, by its name relative to the checkpoint."""
        return {self._name(path): digest_of(path) for path in self._written}

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file."""
        super().save(state_dict, path)
        self._written.append(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file.

        Raises:
            UserError: if it is not what was written, or holds more than data.
        """
        check_content(self._folder, self._name(Path(path)))
        try:
            with torch.serialization.safe_globals(_OWN_TYPES):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(
                f"the checkpoint file '{path}' holds Python objects other than tensors and plain "
                "values, which lmcot never writes and which could run code; none of it was run: "
                "delete this checkpoint if you do not know where it comes from, and the same "
                "command continues from the one before"
            ) from None

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()
