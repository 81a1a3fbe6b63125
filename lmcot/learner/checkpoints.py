"""Checkpoints: complete once their marker is written, newest complete one first."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lmcot.records import RunState

MARKER = "COMPLETE"
STATE = "state.json"
ENGINE = "engine"
"""Subfolder (and DeepSpeed tag) of the engine's own state."""


class CheckpointStore:
    """The checkpoints of one stage: folders ``<prefix>NNNNNN`` below one root."""

    def __init__(self, root: Path, *, prefix: str = "step-", keep: int = 2) -> None:
        self._root = root
        self._prefix = prefix
        self._keep = keep

    def save(self, state: RunState, save_engine: Callable[[Path], None]) -> Path:
        """Writes one checkpoint, marker last, then deletes all but the newest few.

        Args:
            save_engine: writes the engine's state below the folder that it is given.
        """
        folder = self._root / f"{self._prefix}{state.step:06d}"
        if folder.exists():
            _remove(folder)
        folder.mkdir(parents=True)
        save_engine(folder)
        (folder / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        (folder / MARKER).touch()
        for old in self._complete()[: -self._keep]:
            _remove(old)
        return folder

    def latest(self) -> tuple[RunState, Path] | None:
        """The newest complete checkpoint; those without a marker are passed over."""
        complete = self._complete()
        if not complete:
            return None
        folder = complete[-1]
        return RunState(**json.loads((folder / STATE).read_text(encoding="utf-8"))), folder

    def _complete(self) -> list[Path]:
        if not self._root.is_dir():
            return []
        name = re.compile(re.escape(self._prefix) + r"(\d{6,})")
        steps = {
            int(match[1]): folder
            for folder in self._root.iterdir()
            if (match := name.fullmatch(folder.name)) and (folder / MARKER).is_file()
        }
        return [steps[step] for step in sorted(steps)]


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, marker first: half deleted it must not pass for a complete one."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)
