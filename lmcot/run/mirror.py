"""A run directory at a URL: the driver writes to a folder on its own disk, which is uploaded.

What learners write (checkpoints, models) goes to the URL by itself, for they may be on other nodes.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from lmcot.config.stages import LEARNERS_FOLDERS
from lmcot.errors import UserError
from lmcot.files import cache_folder, read_object, write_atomically
from lmcot.monitor.progress import say
from lmcot.ownership import OwnedElsewhere
from lmcot.run.ownership import Ownership
from lmcot.run_files import STAGES, model_folder
from lmcot.storage import append, put, reaching, versions_of

if TYPE_CHECKING:
    from upath import UPath

_RECORD = ".mirror.json"
_LAST = STAGES
"""Says that other files are complete: it is read before they are, and uploaded after them."""
SYNC_S = 15.0


class _Pushed(BaseModel):
    """The files that a folder's last session uploaded."""

    session: str
    before: str | None = None
    """The session before that one, which may have ended before it took the run."""
    pushed: dict[str, list[int]]


class Mirror:
    """Uploads what changes in ``folder`` to the URL of a run that this process owns.

    The session that wrote there last decides which side is newer when a run is opened: the folder,
    if the session was this folder's, since a sudden end may have kept it from uploading; else the
    URL, whatever the folder holds.
    """

    def __init__(self, url: UPath, folder: Path, ownership: Ownership) -> None:
        self._url = url
        self._folder = folder
        self._ownership = ownership
        self._before: str | None = None
        self._pushed: dict[str, list[int]] = {}
        """Size, modification time and CRC-32 of each uploaded file; without the last if an earlier
        version uploaded it."""
        self._busy = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_on, name="mirror", daemon=True)
        self._opened = False

    def open(self) -> None:
        """Takes the run, makes both sides alike, and keeps them so.

        Raises:
            OwnedElsewhere: if another process has it.
            UserError: if the URL cannot be read or written.
        """
        number, last = self._ownership.wait()
        record = self._read_record()
        newer_here = record is not None and last in (None, record.session, record.before)
        if record is not None and newer_here:
            self._pushed, self._before = record.pushed, last or record.session
            self._write_record()  # before the mark: an end in between must not lose the folder
        self._ownership.take(number)
        if not newer_here:
            self._pull()
        self.sync()
        self._opened = True
        self._thread.start()

    def sync(self) -> None:
        """Uploads changed files, and removes deleted ones.

        Raises:
            OwnedElsewhere: if another process has taken the run.
            UserError: if the URL cannot be written; the folder keeps everything.
        """
        with self._busy, reaching(self._url):
            self._ownership.look()
            if self._opened and not (self._folder / _RECORD).exists():
                raise UserError(
                    f"'{self._folder}', where this run writes, was removed: what is at "
                    f"'{self._url}' stays, and the same command resumes from there"
                )
            last = self._folder / _LAST
            content = last.read_bytes() if last.exists() else None
            stamps = self._stamps()
            for name in self._pushed.keys() - stamps.keys():
                self._ownership.confirm()
                with suppress(FileNotFoundError):  # an earlier attempt has removed it
                    self._url.fs.rm_file((self._url / name).path)
                del self._pushed[name]
            for name, stamp in stamps.items():
                if name != _LAST and self._pushed.get(name, [])[:2] != stamp:
                    self._put(name, stamp)
            if content is not None and self._pushed.get(_LAST, [])[:2] != stamps.get(_LAST, []):
                self._ownership.confirm()
                put(self._url / _LAST, content)
                self._pushed[_LAST] = stamps.get(_LAST, [])
            self._write_record()

    def close(self) -> None:
        """Uploads the rest. Raises as `sync` does."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self.sync()

    def _keep_on(self) -> None:
        """Uploads changes repeatedly."""
        failing = False
        while not self._ended.wait(SYNC_S):
            try:
                self.sync()
                failing = False
            except OwnedElsewhere:
                return  # the run itself finds out in the same way, and says so
            except UserError as error:
                if not failing:
                    say(f"{error}; retrying every {SYNC_S:.0f} s, nothing is lost meanwhile")
                failing = True

    def _pull(self) -> None:
        """Replaces the folder's content with that at the URL."""
        (self._folder / _RECORD).unlink(missing_ok=True)  # first: half a folder is never newer
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
        """Uploads a file, or what has been added to it since the last time."""
        try:
            content = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return  # removed meanwhile: the next upload finds it gone
        self._ownership.confirm()
        file, before = self._url / name, self._pushed.get(name, [])
        if not (_has_grown(content, before) and append(file, content[before[0] :], before[0])):
            put(file, content)
        self._pushed[name] = [len(content), stamp[1], zlib.crc32(content)]

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
        record = _Pushed(session=self._ownership.session, before=self._before, pushed=self._pushed)
        write_atomically(self._folder / _RECORD, record.model_dump_json())


def _has_grown(content: bytes, before: list[int]) -> bool:
    """Whether a file begins with what was uploaded of it."""
    if len(before) < 3 or not 0 < before[0] < len(content):
        return False
    return zlib.crc32(memoryview(content)[: before[0]]) == before[2]


def working_folder(url: UPath) -> Path:
    """The folder of this machine's part of a run at a URL."""
    digest = uuid.uuid5(uuid.NAMESPACE_URL, str(url)).hex[:8]
    return cache_folder() / "runs" / f"{url.name}-{digest}"


def _is_own(name: str) -> bool:
    """Whether a file or folder, named relative to the run, is not uploaded."""
    parts = Path(name).parts
    by_learners = model_folder(parts[0]) in LEARNERS_FOLDERS
    return by_learners or any(part.startswith(".") for part in parts)
