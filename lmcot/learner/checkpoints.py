"""Checkpoints: complete once their marker is written, newest complete one first."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypedDict

from lmcot.errors import UserError
from lmcot.records import RunState
from lmcot.storage import is_remote, reaching, remove, versions_of, write_whole

if TYPE_CHECKING:
    from lmcot.storage import Place

MARKER = "COMPLETE"
STATE = "state.json"
FORMAT = 2
"""Version of ``state.json``. Files of version 1 do not say theirs."""
_ONLY_IN_1 = {"units_in_flight", "seeds", "policy_version", "versions"}
"""Fields that version 1 wrote and nothing reads."""


class Listed(TypedDict):
    """What the marker says of a file."""

    bytes: int
    sha256: str | None
    """None for a file that whoever wrote it told no digest of."""


class CheckpointStore:
    """The checkpoints of one stage: folders ``<prefix>NNNNNN`` below one root."""

    def __init__(self, root: Place, *, prefix: str = "step-", keep: int = 2) -> None:
        self._root = root
        self._prefix = prefix
        self._keep = keep

    def begin(self, state: RunState) -> Place:
        """An empty folder for the checkpoint of a state: the engine's part goes into it."""
        folder = self._root / f"{self._prefix}{state.step:06d}"
        _remove(folder)
        if not is_remote(folder):
            folder.mkdir(parents=True)
        return folder

    def finish(self, state: RunState, folder: Place, digests: Mapping[str, str]) -> None:
        """Writes the state, then the marker, then deletes all but the newest few complete ones.

        The marker lists every file with its size and digest, so that damage shows.

        Args:
            digests: of the files that the ranks wrote, by name; taken where they were written,
                since the folder may be at a URL.
        """
        text = json.dumps({"format": FORMAT, **asdict(state)}, indent=1)
        write_whole(folder / STATE, text)
        known = {**digests, STATE: hashlib.sha256(text.encode()).hexdigest()}
        files = {
            name: Listed(bytes=size, sha256=known.get(name))
            for name, (size, _) in versions_of(folder).items()
        }
        write_whole(folder / MARKER, json.dumps(files, indent=1))
        kept = self._complete()[-self._keep :]
        for old in self._folders():
            if old not in kept:
                _remove(old)

    def newest_step(self) -> int:
        """Steps done at the newest complete checkpoint, damaged or not; 0 if there is none."""
        return max(self.steps(), default=0)

    def steps(self) -> list[int]:
        """Steps done at each complete checkpoint, ascending."""
        with reaching(self._root):
            return [int(folder.name.removeprefix(self._prefix)) for folder in self._complete()]

    def latest(self, before: int | None = None) -> tuple[RunState, Place] | None:
        """The newest complete checkpoint; those without a marker are skipped.

        Args:
            before: only one of fewer steps.

        Raises:
            UserError: if a file of it is missing or truncated, or the URL cannot be reached.
        """
        with reaching(self._root):
            return self._latest(before)

    def _latest(self, before: int | None) -> tuple[RunState, Place] | None:
        complete = self._complete(before)
        if not complete:
            return None
        folder = complete[-1]
        _check_sizes(folder)
        check_content(folder, STATE)
        try:
            fields = json.loads((folder / STATE).read_text(encoding="utf-8"))
            version = int(fields.pop("format", 1))
            if version <= FORMAT:
                return _state(fields, version), folder
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(_damaged(folder, f"{STATE}: {error}")) from None
        raise UserError(
            f"the checkpoint '{folder}' has format {version}, and this lmcot reads up to {FORMAT}: "
            "resume with the version of lmcot that wrote it, or a later one"
        )

    def _complete(self, before: int | None = None) -> list[Place]:
        return [folder for folder in self._folders(before) if (folder / MARKER).is_file()]

    def _folders(self, before: int | None = None) -> list[Place]:
        """All that bear this stage's name, oldest step first."""
        if not self._root.is_dir():
            return []
        name = re.compile(re.escape(self._prefix) + r"(\d{6,})")
        steps = {
            int(match[1]): folder
            for folder in self._root.iterdir()
            if (match := name.fullmatch(folder.name))
        }
        return [steps[step] for step in sorted(steps) if before is None or step < before]


def _state(fields: dict[str, Any], version: int) -> RunState:
    """The state that a file of some version holds.

    Raises:
        TypeError: if a field is missing, or is none of that version's.
    """
    dropped = _ONLY_IN_1 if version == 1 else set()
    return RunState(**{name: value for name, value in fields.items() if name not in dropped})


def _remove(folder: Place) -> None:
    """Deletes a checkpoint, marker first: half deleted it must not pass for a complete one."""
    with reaching(folder):
        (folder / MARKER).unlink(missing_ok=True)
    remove(folder)


def digest_of(file: Place) -> str:
    """A file's SHA-256 in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]


def check_content(folder: Place, name: str) -> None:
    """Compares a file of a checkpoint with the digest that the marker has of it, if it has one.

    Raises:
        UserError: if they differ.
    """
    if not (folder / MARKER).is_file():
        return  # it is still being written
    listed = _listed(folder).get(name)
    if listed is not None and listed["sha256"] not in (None, digest_of(folder / name)):
        raise UserError(_damaged(folder, f"the content of {name} has changed"))


def _check_sizes(folder: Place) -> None:
    there = versions_of(folder)
    for name, listed in _listed(folder).items():
        found, size = there[name][0] if name in there else None, listed["bytes"]
        if found != size:
            what = "is missing" if found is None else f"has {found} of its {size} bytes"
            raise UserError(_damaged(folder, f"{name} {what}"))


def _listed(folder: Place) -> dict[str, Listed]:
    """The marker's content; that of earlier versions is a size for each file."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return {
            name: Listed(bytes=one, sha256=None)
            if isinstance(one, int)
            else Listed(bytes=int(one["bytes"]), sha256=one["sha256"])
            for name, one in files.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(_damaged(folder, f"{MARKER} cannot be read")) from None


def _damaged(folder: Place, what: str) -> str:
    return (
        f"the checkpoint '{folder}' is damaged ({what}): delete it, and the same command "
        "continues from the one before"
    )
