"""A run's directory: its paths, its settings on disk, and the process that writes to it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lmcot import run_files
from lmcot.config import (
    TRAINING_STAGES,
    Config,
    depends,
    differences,
    dump_config,
    parse_config,
    read_yaml_mapping,
)
from lmcot.config.renamed import ADDED, added_since
from lmcot.errors import UserError
from lmcot.files import read_lines, read_object, write_atomically
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.monitor.progress import say
from lmcot.ownership import Claim, OwnedElsewhere
from lmcot.records import Annotation
from lmcot.run.mirror import Mirror, working_folder
from lmcot.run.ownership import Ownership
from lmcot.run.versions import versions
from lmcot.storage import is_remote, persistently

if TYPE_CHECKING:
    from lmcot.storage import Place

_COMPARED_BY_CONTENT = ("data.train", "data.max_train", "data.on_bad_record", "prompts.templates")
_PUT_BACK = "put it back from a copy, or use another --run-dir"
_LEAST_FREE_BYTES = 256 * 2**20


class DirectoryInUse(UserError):
    """Another process owns the run directory."""


class RunDirectory:
    """Paths of a run, its settings on disk and the record of finished stages.

    Use as a context manager: one process at a time owns the directory. For a run at a URL, ``home``
    is that URL, and holds what learners write; ``path`` is a folder on this disk for everything
    else, which is uploaded as it grows.
    """

    def __init__(self, home: Place) -> None:
        self.home = home
        self.path = path = working_folder(home) if is_remote(home) else home
        self.config_file = path / run_files.CONFIG
        self.rationales = path / run_files.RATIONALES
        self.rationales_begun = path / run_files.RATIONALES_BEGUN
        self.rationales_table = path / run_files.RATIONALES_TABLE
        # Actors read and write these, and may have another working directory.
        self._shared = home if is_remote(home) else path.absolute()
        self.best = self._shared / run_files.BEST
        self.critic = self._shared / run_files.CRITIC
        self.checkpoints = self._shared / run_files.CHECKPOINTS
        self.predictions = path / run_files.PREDICTIONS
        self._stages = path / run_files.STAGES
        self._inputs = path / run_files.INPUTS
        self._lock: Any = None
        self._ownership = Ownership(self._shared, path.absolute())
        self._mirror = Mirror(home, path, self._ownership) if is_remote(home) else None

    def __enter__(self) -> RunDirectory:
        """Makes the directory if it is missing, and locks it.

        Raises:
            DirectoryInUse, OwnedElsewhere: if another process owns it. A lock tells that of a
                process on this machine, a mark in the folder or at the URL of any other.
            UserError: if it cannot be written to, or is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / run_files.LOCK).open("w")
            stats = os.statvfs(self.path)
        except OSError as error:
            raise UserError(
                f"the run directory '{self.path}' cannot be written ({error.strerror}): choose "
                "another with --run-dir"
            ) from None
        if stats.f_bavail * stats.f_frsize < _LEAST_FREE_BYTES:
            self._lock.close()
            raise UserError(
                f"the disk of the run directory '{self.path}' is full: free some space, or choose "
                "another with --run-dir"
            )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise DirectoryInUse(
                f"another lmcot process is writing to the run directory '{self.home}': wait for "
                "it, or choose another with --run-dir"
            ) from None
        try:
            if self._mirror is not None:
                self._mirror.open()
            else:
                self._take_folder()
            run_files.check_format(self.path)
        except BaseException:
            self._ownership.stop()
            self._lock.close()
            raise
        return self

    def _take_folder(self) -> None:
        """Takes a run in a folder, which processes on other machines may share."""
        try:
            self._ownership.take(self._ownership.wait()[0])
        except OSError as error:
            raise UserError(
                f"the run directory '{self.path}' cannot be written ({error.strerror}): choose "
                "another with --run-dir"
            ) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._mirror is not None:
                self._mirror.close()
            self._ownership.release()
        except UserError as failure:
            if error is None:
                raise
            if not isinstance(error, OwnedElsewhere):
                say(str(failure))  # the error that ended the run says more
        finally:
            self._ownership.stop()
            self._lock.close()

    @property
    def claim(self) -> Claim | None:
        """This process's claim to the run, which others check before they write into it.

        None outside of the context.
        """
        return self._ownership.claim

    def check_owner(self) -> None:
        """Raises if another process was found to have taken the run; asks nobody, so that it may
        be called often.

        Raises:
            OwnedElsewhere: if one has.
        """
        self._ownership.check()

    def policy(self, name: str) -> Place:
        """Folder of the policy of a name, whether or not it is there yet."""
        return self._shared / name

    def sync(self) -> None:
        """Uploads everything written so far, if the run is at a URL.

        Raises:
            UserError: if it cannot be written there; nothing is lost on this disk.
        """
        if self._mirror is not None:
            persistently(self._mirror.sync)

    def check_config(self, config: Config) -> list[str]:
        """Compares the settings with those that the run was last used with, if any.

        Returns:
            a line for each key that was changed, which is allowed.

        Raises:
            UserError: naming the changed keys that a stage which has begun depends on.
        """
        if not self.config_file.exists():
            return []
        values = read_yaml_mapping(self.config_file)
        try:
            before = parse_config(values)
        except UserError as error:
            raise UserError(
                f"the run directory '{self.home}' has settings that this version of lmcot "
                f"does not know ({error}): use another --run-dir"
            ) from None
        new = added_since(values)
        changed = {
            key: both
            for key, both in differences(before, config).items()
            # Such a default is not what the earlier version acted by.
            if not (key in new and both[0] != ADDED[key])
        }
        self._check_teacher(changed.get("teacher.kind"))
        if not changed:
            return []
        fixed = {
            stage: [key for key in changed if self._fixes(stage, key, before)]
            for stage in self.begun(before)
        }
        if held := {stage: keys for stage, keys in fixed.items() if keys}:
            keys = sorted({key for keys in held.values() for key in keys})
            raise UserError(
                f"the run directory '{self.home}' was created with another value of "
                f"{', '.join(keys)}: restore it, or use a new --run-dir; stages that have "
                f"begun and depend on it: {', '.join(held)}"
            )
        return [f"{key}: {now!r} now, {then!r} before" for key, (then, now) in changed.items()]

    def _check_teacher(self, kinds: tuple[Any, Any] | None) -> None:
        """Refuses to continue another teacher's work.

        Raises:
            UserError: if the kind of the teacher changed, and some of its rationales are good.
        """
        if kinds is not None and (self.rationales_begun.exists() or self._any_kept()):
            raise UserError(
                f"the rationales in '{self.path}' are those of the teacher '{kinds[0]}', but "
                f"teacher.kind is '{kinds[1]}' now: restore it, or use a new --run-dir"
            )

    def _fixes(self, stage: str, key: str, config: Config) -> bool:
        """Whether a key cannot be changed because a stage that has begun depends on it."""
        if key.startswith(_COMPARED_BY_CONTENT) and self.inputs(stage):
            return False
        return depends(stage, key, config, finished=self.finished(stage) is not None)

    def begun(self, config: Config) -> list[str]:
        """The stages with work on disk that another session would resume from.

        Args:
            config: the settings that it was done with.
        """
        found: list[str] = []
        asked = config.teacher is not None and config.teacher.kind == "frozen"
        if asked and (self.rationales_begun.exists() or self._any_kept()):
            found.append("annotate")
        for stage in TRAINING_STAGES:
            store = CheckpointStore(self.checkpoints, prefix=stage.checkpoint_prefix)
            gathered = stage.gathers and (self.path / stage.gathers).exists()
            if gathered or self.finished(stage.name) is not None or store.newest_step():
                found.append(stage.name)
        if (self.path / run_files.TRIALS).is_dir():
            found.append("sweep")
        return found

    def _any_kept(self) -> bool:
        if not self.rationales.exists():
            return False
        return any(one.kept for one in read_annotations(self.rationales))

    def begin(self, stage: str, inputs: dict[str, str]) -> None:
        """Records a stage's inputs, by their content."""
        write_atomically(self._inputs, json.dumps({**self._read_inputs(), stage: inputs}, indent=1))

    def inputs(self, stage: str) -> dict[str, str]:
        """The recorded inputs of a stage; empty if there are none."""
        return self._read_inputs().get(stage, {})

    def _read_inputs(self) -> dict[str, dict[str, str]]:
        return read_object(self._inputs, _PUT_BACK)

    def write_config(self, config: Config) -> None:
        """Writes the settings, and the versions that they were run with."""
        lines = [f"# {name}: {version}" for name, version in versions().items()]
        text = "\n".join(["# Settings as resolved; made with", *lines, dump_config(config)])
        write_atomically(self.config_file, text)
        run_files.write_format(self.path)

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The facts recorded when the stage finished; None if it has not."""
        return self._read_stages().get(stage)

    def finish(self, stage: str, **facts: Any) -> None:
        """Records that a stage is done."""
        stages = {**self._read_stages(), stage: facts}
        write_atomically(self._stages, json.dumps(stages, indent=1) + "\n")

    def _read_stages(self) -> dict[str, Any]:
        return read_object(self._stages, _PUT_BACK)


def read_annotations(path: Path, *, begun: bool = False) -> list[Annotation]:
    """The lines of a ``rationales.jsonl``; none if there is no file.

    Args:
        begun: the annotation was interrupted, so that the last line may be cut short.

    Raises:
        UserError: naming the line that is none.
    """
    remedy = (
        "delete that line, and its question is annotated again"
        if begun
        else "delete the file, and 'lmcot annotate' makes it again"
    )
    found = []
    for number, record in enumerate(read_lines(path, remedy, whole=not begun), 1):
        try:
            found.append(Annotation(**record))
        except TypeError as error:
            raise UserError(f"line {number} of '{path}' is damaged ({error}): {remedy}") from None
    return found
