"""Takes a run for this process, tells others that it lives, and notices if another has taken it."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from lmcot.errors import UserError
from lmcot.monitor.progress import say
from lmcot.ownership import Claim, Mark, OwnedElsewhere, claim, newest_mark
from lmcot.storage import is_remote, reaching, write_whole

if TYPE_CHECKING:
    from lmcot.storage import Place

OWNER = ".owner.json"
"""The file that the owner keeps changing. Earlier versions know only it, and no marks."""
BEAT_S = 15.0
LEASE_S = 60.0
"""Seconds without a heartbeat before an owner is presumed dead."""
_LOOK_EVERY_S = 1.0
_TRIES = 3
"""Attempts at reading the heartbeat: not every file system writes a file atomically."""


class _Heartbeat(BaseModel):
    """The last sign of life of a run's owner."""

    session: str
    host: str
    folder: str
    pid: int
    beats: int
    done: bool


class Ownership:
    """Owns a run for this process, from `take` to `release`.

    Of processes that start at the same time the store lets one make its mark (`lmcot.ownership`).
    An owner whose heartbeat stops is presumed dead after `LEASE_S`; one that was only silent finds
    the next owner's mark when it looks, and ends.
    """

    def __init__(self, home: Place, folder: Path) -> None:
        """Args: folder: where this process writes, which it has locked on this machine."""
        self._home = home
        self._folder = folder
        self._session = uuid.uuid4().hex
        self._beats = 0
        self._claim: Claim | None = None
        self._looked = 0.0
        self._lost: OwnedElsewhere | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="owner", daemon=True)

    @property
    def session(self) -> str:
        """The name of this session, which no other has."""
        return self._session

    @property
    def claim(self) -> Claim | None:
        """What others who write for this process check first; None before `take`."""
        return self._claim

    def wait(self) -> tuple[int, str | None]:
        """Waits until the run's last owner has given it up, or is presumed dead.

        Returns:
            the number of its mark, and its session; None if the run had no owner.

        Raises:
            OwnedElsewhere: if it lives.
        """
        number, mark = newest_mark(self._home)
        beat = self._read()
        last: Mark | _Heartbeat | None = mark or beat
        if last is None or self._was_here(last):
            return number, last.session if last else None
        who = f"the process {last.pid} on {last.host}"
        deadline, told = time.monotonic() + LEASE_S, False
        while not (beat is not None and beat.done and beat.session == last.session):
            if time.monotonic() > deadline:
                say(f"{who} has been silent for {LEASE_S:.0f} s, and is presumed dead")
                break
            if not told:
                say(f"waiting up to {LEASE_S:.0f} s for a sign of life of {who}, which had the run")
                told = True
            time.sleep(_LOOK_EVERY_S)
            now = newest_mark(self._home)[0], self._read()
            if now != (number, beat) and not (now[1] is not None and now[1].done):
                living = now[1] or last
                raise OwnedElsewhere(
                    f"the process {living.pid} on {living.host} is writing to the run at "
                    f"'{self._home}': wait for it, or choose another with --run-dir"
                )
            beat = now[1]
        return number, last.session

    def take(self, after: int) -> None:
        """Makes this process the owner.

        Args:
            after: the number of the last owner's mark, as `wait` returned it.

        Raises:
            OwnedElsewhere: if another process has taken the run since.
        """
        mark = Mark(self._session, _host(), str(self._folder), os.getpid())
        self._claim = claim(self._home, after + 1, mark)
        self._looked = _clock()
        self._beat()
        self._thread.start()

    def check(self) -> None:
        """Raises `OwnedElsewhere` if another process was found to have the run; asks nobody."""
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """As `look`, but asks the store only if the last answer is not a recent one."""
        self.check()
        if _clock() - self._looked > LEASE_S / 2:
            self.look()

    def look(self) -> None:
        """Asks the store whether the run is still this process's; raises as `Claim.check` does."""
        if self._claim is None:
            raise RuntimeError("the run was not taken")
        began = _clock()
        try:
            self._claim.check()
        except OwnedElsewhere as error:
            self._lost = error
            raise
        self._looked = began

    def release(self) -> None:
        """Gives the run up, so that the next owner need not wait.

        Raises:
            UserError: if another process has taken it, or the store cannot be reached.
        """
        self.stop()
        self.look()
        with suppress(OSError):  # a full disk: the next owner waits for the lease instead
            self._beat(done=True)

    def stop(self) -> None:
        """Ends the heartbeat; the run stays this process's until another takes it."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _live(self) -> None:
        """Sends the heartbeat, however long the process waits for something else."""
        while not self._ended.wait(BEAT_S):
            try:
                self.look()
                self._beat()
            except OwnedElsewhere:
                return
            except (UserError, OSError):
                continue  # what else writes there fails in the same way and reports it

    def _beat(self, *, done: bool = False) -> None:
        self._beats += 1
        beat = _Heartbeat(
            session=self._session, host=_host(), folder=str(self._folder), pid=os.getpid(),
            beats=self._beats, done=done,
        )  # fmt: skip
        write_whole(self._home / OWNER, beat.model_dump_json())

    def _read(self) -> _Heartbeat | None:
        file = self._home / OWNER
        for _ in range(_TRIES):
            try:
                with reaching(file, absent_is_an_error=False):
                    text = file.fs.cat_file(file.path) if is_remote(file) else file.read_bytes()
                return _Heartbeat.model_validate_json(text)
            except FileNotFoundError:
                return None
            except ValidationError as error:
                what = error.errors()[0]["msg"]
            time.sleep(_LOOK_EVERY_S)
        raise UserError(
            f"the file '{file}', which says who writes to this run, is damaged ({what}): make sure "
            "that no other lmcot process writes to the run, delete the file, and run the same "
            "command again"
        )

    def _was_here(self, owner: Mark | _Heartbeat) -> bool:
        """Whether the owner wrote in this folder: this process has locked it, so the owner is
        dead. A run's own folder may have been moved since."""
        same_folder = owner.folder == str(self._folder) or not is_remote(self._home)
        return owner.host == _host() and same_folder


def _clock() -> float:
    """Seconds that pass also while the process is stopped or the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _host() -> str:
    return socket.gethostname()
