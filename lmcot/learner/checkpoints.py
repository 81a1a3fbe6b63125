"""Checkpoints: complete once their marker is written, newest complete one first."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from lmcot.errors import UserError
from lmcot.records import RunState
from lmcot.storage import is_remote, persistently, reaching, remove, versions_of, write_whole

if TYPE_CHECKING:
    from lmcot.ownership import Claim
    from lmcot.storage import Place

MARKER = "COMPLETE"
STATE = "state.json"
_NUMBERS = r"\d{6,}(-\d+)?"
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
    """The checkpoints of one stage: folders ``<prefix>NNNNNN`` below one root.

    At a URL the later owners of a run add their number to the name (``step-000010-2``): what an
    earlier owner's learners still upload, from wherever they are, is in a folder of its own.
    """

    def __init__(
        self, root: Place, *, prefix: str = "step-", keep: int = 2, claim: Claim | None = None
    ) -> None:
        """Args: claim: to the run, which is checked before anything is written or removed."""
        self._root = root
        self._prefix = prefix
        self._keep = keep
        self._claim = claim
        self._owner = 1 if claim is None else self._first_free(claim.number)

    def _first_free(self, number: int) -> int:
        """The number in this owner's names; a copy of a run may have forgotten who its owners
        were."""
        with reaching(self._root):
            there = max((self._number(folder)[1] for folder in self._folders()), default=1)
        return max(there, number) if is_remote(self._root) else there

    def begin(self, state: RunState) -> Place:
        """An empty folder for the checkpoint of a state: the engine's part goes into it."""
        self._check_owner()
        owner = f"-{self._owner}" if self._owner > 1 else ""
        folder = self._root / f"{self._prefix}{state.step:06d}{owner}"
        persistently(partial(_remove, folder))
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
        self._check_owner()
        persistently(partial(self._complete_it, state, folder, digests))
        self._check_owner()
        persistently(self._drop_old)

    def _check_owner(self) -> None:
        if self._claim is not None:
            self._claim.check_persistently()

    def _complete_it(self, state: RunState, folder: Place, digests: Mapping[str, str]) -> None:
        text = json.dumps({"format": FORMAT, **asdict(state)}, indent=1)
        write_whole(folder / STATE, text)
        known = {**digests, STATE: hashlib.sha256(text.encode()).hexdigest()}
        files = {
            name: Listed(bytes=size, sha256=known.get(name))
            for name, (size, _) in versions_of(folder).items()
        }
        write_whole(folder / MARKER, json.dumps(files, indent=1))

    def _drop_old(self) -> None:
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
            return sorted({self._number(folder)[0] for folder in self._complete()})

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
        """The complete ones, oldest step first.

        Without those of an earlier owner beyond the step that a later one has resumed from: their
        last files were written by an owner that was silent, and came back.
        """
        found, newest = [], 0
        for folder in self._folders(before):
            owner = self._number(folder)[1]
            if owner >= newest and (folder / MARKER).is_file():
                found.append(folder)
                newest = owner
        return found

    def _folders(self, before: int | None = None) -> list[Place]:
        """All that bear this stage's name, oldest step and owner first."""
        if not self._root.is_dir():
            return []
        name = re.compile(re.escape(self._prefix) + _NUMBERS)
        found = [folder for folder in self._root.iterdir() if name.fullmatch(folder.name)]
        found.sort(key=self._number)
        return [folder for folder in found if before is None or self._number(folder)[0] < before]

    def _number(self, folder: Place) -> tuple[int, int]:
        """The steps done at a checkpoint, and the number of the owner that wrote it."""
        step, _, owner = folder.name.removeprefix(self._prefix).partition("-")
        return int(step), int(owner or 1)


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
