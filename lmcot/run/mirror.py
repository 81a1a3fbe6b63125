"""A run directory at a URL: the driver writes to a folder on its own disk, which is uploaded.

What learners write (checkpoints, models) goes to the URL by itself, for they may be on other nodes.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from lmcot.config.stages import LEARNERS_FOLDERS
from lmcot.errors import UserError
from lmcot.files import cache_folder, read_object, write_atomically
from lmcot.monitor.progress import say
from lmcot.run_files import STAGES, model_folder
from lmcot.storage import put, reaching, versions_of, write_whole

if TYPE_CHECKING:
    from upath import UPath

OWNER = ".owner.json"
_RECORD = ".mirror.json"
_LAST = STAGES
"""Says that other files are complete: it is read before they are, and uploaded after them."""
SYNC_S = 15.0
LEASE_S = 60.0
"""Seconds without a heartbeat before an owner is presumed dead."""
_LOOK_EVERY_S = 1.0
_TRIES = 3
"""Attempts at reading the owner's record: not every file system writes a file atomically."""


class _Owner(BaseModel):
    """The process that writes to a run, as the record at its URL says."""

    session: str
    host: str
    folder: str
    pid: int
    beats: int
    done: bool


class _Pushed(BaseModel):
    """The files that a folder's last session uploaded."""

    session: str
    pushed: dict[str, list[int]]


class OwnedElsewhere(UserError):
    """Another process writes to this run."""


class Mirror:
    """Owns a run at a URL, and uploads what changes in ``folder``.

    Ownership is a record at the URL that its owner keeps changing. The session that wrote there
    last decides which side is newer when a run is opened: the folder, if the session was this
    folder's, since a sudden end may have kept it from uploading; else the URL, whatever the folder
    holds.
    """

    def __init__(self, url: UPath, folder: Path) -> None:
        self._url = url
        self._folder = folder
        self._session = uuid.uuid4().hex
        self._beats = 0
        self._pushed: dict[str, list[int]] = {}
        """Size and modification time of each uploaded file."""
        self._busy = threading.RLock()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=one, name=f"mirror{one.__name__}", daemon=True)
            for one in (self._keep_on, self._live)
        ]
        self._opened = False

    def open(self) -> None:
        """Takes the run, makes both sides alike, and keeps them so.

        Raises:
            OwnedElsewhere: if another process has it.
            UserError: if the URL cannot be read or written.
        """
        last = self._wait_for_owner()
        record = self._read_record()
        if record is None or last not in (None, record.session):
            self._pull()
        else:
            self._pushed = record.pushed
        self._beat()
        with reaching(self._url):
            owner = self._owner()
        if owner is None or owner.session != self._session:
            raise OwnedElsewhere(f"another lmcot process has just taken '{self._url}'")
        self.sync()
        self._opened = True
        for thread in self._threads:
            thread.start()

    def sync(self) -> None:
        """Uploads changed files, and removes deleted ones.

        Raises:
            OwnedElsewhere: if another process has taken the run.
            UserError: if the URL cannot be written; the folder keeps everything.
        """
        with self._busy, reaching(self._url):
            self._check_owner()
            if self._opened and not (self._folder / _RECORD).exists():
                raise UserError(
                    f"'{self._folder}', where this run writes, was removed: what is at "
                    f"'{self._url}' stays, and the same command resumes from there"
                )
            last = self._folder / _LAST
            content = last.read_bytes() if last.exists() else None
            stamps = self._stamps()
            for name in self._pushed.keys() - stamps.keys():
                with suppress(FileNotFoundError):  # an earlier attempt has removed it
                    self._url.fs.rm_file((self._url / name).path)
                del self._pushed[name]
            for name, stamp in stamps.items():
                if name != _LAST and self._pushed.get(name) != stamp:
                    self._put(name, stamp)
            if content is not None and self._pushed.get(_LAST) != stamps.get(_LAST):
                put(self._url / _LAST, content)
                self._pushed[_LAST] = stamps.get(_LAST, [])
            self._write_record()

    def close(self) -> None:
        """Uploads the rest, and gives up the run. Raises as `sync` does."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.sync()
        self._beat(done=True)

    def _check_owner(self) -> None:
        owner = self._owner()
        if owner is not None and owner.session != self._session:
            raise OwnedElsewhere(
                f"the process {owner.pid} on {owner.host} has taken over '{self._url}', since "
                f"this one was silent for more than {LEASE_S:.0f} s: it ends here"
            )

    def _live(self) -> None:
        """Sends the owner's heartbeat, however long an upload takes."""
        while not self._ended.wait(SYNC_S):
            try:
                with reaching(self._url):
                    self._check_owner()
                self._beat()
            except UserError:
                continue  # uploads fail in the same way and report it

    def _keep_on(self) -> None:
        """Uploads changes repeatedly."""
        failing = False
        while not self._ended.wait(SYNC_S):
            try:
                self.sync()
                failing = False
            except OwnedElsewhere as error:
                say(str(error))
                return
            except UserError as error:
                if not failing:
                    say(f"{error}; retrying every {SYNC_S:.0f} s, nothing is lost meanwhile")
                failing = True

    def _wait_for_owner(self) -> str | None:
        """The last owner's session, once it has given up the run or is presumed dead."""
        with reaching(self._url):
            first = owner = self._owner()
        deadline = time.monotonic() + LEASE_S
        told = False
        while owner is not None and not owner.done and not self._was_here(owner):
            who = f"the process {owner.pid} on {owner.host}"
            if owner != first:
                raise OwnedElsewhere(
                    f"{who} is writing to the run at '{self._url}': wait for it, or choose another "
                    "with --run-dir"
                )
            if time.monotonic() > deadline:
                say(f"{who} has been silent for {LEASE_S:.0f} s, and is presumed dead")
                break
            if not told:
                say(f"waiting up to {LEASE_S:.0f} s for a sign of life of {who}, which had the run")
                told = True
            time.sleep(_LOOK_EVERY_S)
            with reaching(self._url):
                owner = self._owner()
        return first.session if first is not None else None

    def _was_here(self, owner: _Owner) -> bool:
        """Whether the owner wrote in this folder: this process has locked it, so the owner is
        dead."""
        return (owner.host, owner.folder) == (_host(), str(self._folder))

    def _owner(self) -> _Owner | None:
        for _ in range(_TRIES):
            try:
                return _Owner.model_validate_json(self._url.fs.cat_file((self._url / OWNER).path))
            except FileNotFoundError:
                return None
            except ValidationError as error:
                what = error.errors()[0]["msg"]
            time.sleep(_LOOK_EVERY_S)
        raise UserError(
            f"the file '{self._url / OWNER}', which says who writes to this run, is damaged "
            f"({what}): make sure that no other lmcot process writes to the run, delete the file, "
            "and run the same command again"
        )

    def _beat(self, *, done: bool = False) -> None:
        self._beats += 1
        owner = _Owner(
            session=self._session, host=_host(), folder=str(self._folder), pid=os.getpid(),
            beats=self._beats, done=done,
        )  # fmt: skip
        write_whole(self._url / OWNER, owner.model_dump_json())

    def _pull(self) -> None:
        """Replaces the folder's content with that at the URL."""
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        with reaching(self._url):
            names = [name for name in versions_of(self._url) if not _is_own(name)]
            for name in names:
                target = self._folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._url.fs.get_file((self._url / name).path, str(target))
        self._pushed = self._stamps()
        if names:
            say(f"fetched the run as it is at '{self._url}': {len(names)} files")

    def _put(self, name: str, stamp: list[int]) -> None:
        try:
            content = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return  # removed meanwhile: the next upload finds it gone
        put(self._url / name, content)
        self._pushed[name] = stamp

    def _stamps(self) -> dict[str, list[int]]:
        """Stamps of the files to upload, without those being written and those of learners."""
        found = {}
        for folder, folders, files in os.walk(self._folder):
            below = Path(folder).relative_to(self._folder)
            folders[:] = [one for one in folders if not _is_own(str(below / one))]
            for file in files:
                name = str(below / file)
                try:
                    stat = (self._folder / name).stat()
                except FileNotFoundError:
                    continue
                if not _is_own(name):
                    found[name] = [stat.st_size, stat.st_mtime_ns]
        return found

    def _read_record(self) -> _Pushed | None:
        remedy = f"delete the folder '{self._folder}' to start from what is at the URL"
        record = read_object(self._folder / _RECORD, remedy)
        try:
            return _Pushed.model_validate(record) if record else None
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise UserError(
                f"the file '{self._folder / _RECORD}' is damaged ({what}): {remedy}"
            ) from None

    def _write_record(self) -> None:
        record = _Pushed(session=self._session, pushed=self._pushed)
        write_atomically(self._folder / _RECORD, record.model_dump_json())


def working_folder(url: UPath) -> Path:
    """The folder of this machine's part of a run at a URL."""
    digest = uuid.uuid5(uuid.NAMESPACE_URL, str(url)).hex[:8]
    return cache_folder() / "runs" / f"{url.name}-{digest}"


def _is_own(name: str) -> bool:
    """Whether a file or folder, named relative to the run, is not uploaded."""
    parts = Path(name).parts
    by_learners = model_folder(parts[0]) in LEARNERS_FOLDERS
    return by_learners or any(part.startswith(".") for part in parts)


def _host() -> str:
    return socket.gethostname()
