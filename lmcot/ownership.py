"""The mark of the process that owns a run, which whoever writes into the run checks first.

Each session of a run adds one small file with the next number to the run's ``.owner`` folder. The
store lets only one process create a file of one name (S3 and GCS by a conditional write, a file
system by a link), and the highest number is the owner: whoever finds a higher number than its own
has lost the run. An earlier owner that was silent can change nothing about that when it comes back.
"""

from __future__ import annotations

import errno
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lmcot.errors import UserError
from lmcot.storage import is_remote, persistently, place, put, reaching, versions_of

if TYPE_CHECKING:
    from upath import UPath

    from lmcot.storage import Place

MARKS: Final = ".owner"
"""The folder of the marks, below the run's own."""
SETTLE_S = 2.0
"""Seconds to wait for another process's mark where the store would let it replace this one's."""
_CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs"})
"""Protocols whose file systems create a file only if there is none, in one request."""
_TRIES = 5
_PAUSE_S = 0.5


class OwnedElsewhere(UserError):
    """Another process writes to this run."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a mark says of the process that made it."""

    session: str
    host: str
    folder: str
    """Where the process itself writes."""
    pid: int

    @property
    def who(self) -> str:
        """The process in words."""
        return f"the process {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class Claim:
    """A session's claim to a run: valid as long as no later session has made its mark."""

    home: str
    """The run's directory, a path or a URL."""
    number: int
    session: str

    def check(self) -> None:
        """Checks that the run is still this session's.

        Raises:
            OwnedElsewhere: if another process has taken it.
            UserError: if the mark was removed, or cannot be read.
        """
        home = place(self.home)
        later, own = read_mark(home, self.number + 1), read_mark(home, self.number)
        other = later or (own if own is not None and own.session != self.session else None)
        if other is not None:
            raise OwnedElsewhere(
                f"{other.who} has taken over the run '{self.home}', since its owner was silent for "
                "too long: this one ends here, and writes nothing more"
            )
        if own is None:
            raise UserError(
                f"'{self.home}', where this run writes, was removed: run the same command again"
            )

    def check_persistently(self) -> None:
        """Checks the same, and waits for a store that cannot be reached for a moment."""
        persistently(self.check)


def newest_mark(home: Place) -> tuple[int, Mark | None]:
    """The highest number of the marks in a run, and what that mark says; 0 without any."""
    folder = home / MARKS
    names = versions_of(folder) if is_remote(folder) or folder.is_dir() else {}
    numbers = [int(name[:-5]) for name in names if name[:-5].isdecimal() and name[-5:] == ".json"]
    newest = max(numbers, default=0)
    return newest, read_mark(home, newest) if newest else None


def read_mark(home: Place, number: int) -> Mark | None:
    """The mark of a number; None if there is none.

    Raises:
        UserError: if the file is damaged.
    """
    file = _file(home, number)
    for _ in range(_TRIES):
        try:
            # In one request: a file system's own open() may ask for the size first.
            with reaching(file, absent_is_an_error=False):
                text = file.fs.cat_file(file.path) if is_remote(file) else file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Mark(**json.loads(text))
        except (ValueError, TypeError) as error:
            what = str(error)
        time.sleep(_PAUSE_S)  # not every file system writes a file atomically
    raise UserError(
        f"the file '{file}', which says who writes to this run, is damaged ({what}): make sure "
        "that no other lmcot process writes to the run, delete the file, and run the same command "
        "again"
    )


def claim(home: Place, number: int, mark: Mark) -> Claim:
    """Makes a mark, if nobody has made one of that number.

    Raises:
        OwnedElsewhere: if another process has.
        UserError: if the store cannot be written.
    """
    content = json.dumps(asdict(mark)).encode()
    file, mine = _file(home, number), Claim(str(home), number, mark.session)
    with reaching(file):
        settled = _made(partial(_create, file, content), home, number, mark)
    if not settled:
        time.sleep(SETTLE_S)
    mine.check()
    return mine


def _made(create: Callable[[], bool], home: Place, number: int, mark: Mark) -> bool:
    """Creates a mark; whether no other process can replace it from now on.

    An attempt whose answer was lost is repeated, and then finds its own mark there.

    Raises:
        OwnedElsewhere: if another process has made one of this number.
    """
    for attempt in range(_TRIES):
        try:
            return create()
        except Exception as error:  # of many types, see `reaching`
            there = read_mark(home, number)
            if there == mark:
                return True
            if there is not None:
                raise OwnedElsewhere(
                    f"{there.who} has just taken the run '{home}': wait for it, or choose another "
                    "with --run-dir"
                ) from None
            if getattr(error, "errno", None) != errno.EBUSY or attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE_S)  # two conditional writes met, and the store refused both
    raise AssertionError("the last attempt returns or raises")


def _create(file: Place, content: bytes) -> bool:
    return _create_at_url(file, content) if is_remote(file) else _link(file, content)


def _create_at_url(file: UPath, content: bytes) -> bool:
    """Creates a file at a URL; whether the store did so only because there was none."""
    if file.protocol not in _CONDITIONAL:
        if file.fs.exists(file.path):
            raise FileExistsError(file.path)
        put(file, content)
        return False
    try:
        file.fs.pipe_file(file.path, content, mode="create")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        put(file, content)  # a store that knows no conditional writes, and says so
        return False
    return _refuses_another(file, content)


def _refuses_another(file: UPath, content: bytes) -> bool:
    """Whether a store refuses to create a file again; some ignore the condition."""
    try:
        file.fs.pipe_file(file.path, content, mode="create")
    except FileExistsError:
        return True
    return False


def _link(file: Path, content: bytes) -> bool:
    """Creates a file on a disk, complete from the beginning; also on NFS only one process can."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        try:
            os.link(partial, file)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with file.open("xb") as made:
                made.write(content)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _file(home: Place, number: int) -> Place:
    return home / MARKS / f"{number:06d}.json"
