"""Replies of the frozen LM, kept on the node's own disk by the content of their requests.

SQLite in its write-ahead mode: any number of processes may read and write, and a process that is
killed leaves either the whole of its last transaction or nothing of it.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lmcot.errors import UserError
from lmcot.files import cache_folder, open_private, private_folder
from lmcot.storage import local_path

_WAIT_S = 60.0
"""How long one process waits for another's transaction."""
_SPARED = 0.9
"""Share of the size limit that is still used after the least recently used were dropped."""
_FRESH_S = 600
"""Seconds within which the time of use is not updated, so that most reads need no write."""
_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key BLOB PRIMARY KEY, model TEXT NOT NULL, reply TEXT NOT NULL,
    size INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON replies (used);
CREATE TABLE IF NOT EXISTS held (bytes INTEGER NOT NULL);
INSERT INTO held SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM held);
CREATE TRIGGER IF NOT EXISTS more AFTER INSERT ON replies
    BEGIN UPDATE held SET bytes = bytes + NEW.size; END;
CREATE TRIGGER IF NOT EXISTS less AFTER DELETE ON replies
    BEGIN UPDATE held SET bytes = bytes - OLD.size; END;
"""


def cache_path(folder: str | None) -> Path:
    """The cache's file in a folder; None is the default one of this machine."""
    return (local_path(folder) if folder else cache_folder()) / "frozen-lm-replies.sqlite"


@dataclass(frozen=True, slots=True)
class Held:
    """What a cache holds of one model's replies."""

    model: str
    replies: int
    bytes: int


class ReplyCache:
    """The cache's file; processes and threads may share it, but it does not survive a fork.

    Args:
        path: the file, on a local disk, since SQLite's locks do not hold on network file systems.
        max_bytes: largest size of all replies; the least recently used are dropped first.

    Raises:
        UserError: if the file cannot be opened, or is not a cache of this version.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        try:
            private_folder(path.parent)
            open_private(path, "ab").close()  # SQLite gives its other files the same mode
            self._lock = threading.Lock()
            self._connection = sqlite3.connect(
                path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
            )
            self._open()
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"the frozen LM's cache {path} cannot be opened ({error}): remove the file, or set "
                "frozen.cache.folder to a writable folder on a local disk"
            ) from error

    def _open(self) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode = WAL")
        # A power cut may lose the last transactions, but never harms the file.
        run("PRAGMA synchronous = NORMAL")
        with self._transaction():
            version = run("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise sqlite3.DatabaseError(f"its format is {version}, not {_VERSION}")
            for statement in _statements(_SCHEMA):
                run(statement)
            run(f"PRAGMA user_version = {_VERSION}")

    def get(self, keys: Sequence[bytes]) -> list[str | None]:
        """The reply to each request; None where there is none."""
        found: dict[bytes, str] = {}
        stale: list[tuple[bytes]] = []
        now = int(time.time())
        with self._lock, self._sound():
            for key in dict.fromkeys(keys):
                row = self._connection.execute(
                    "SELECT reply, used FROM replies WHERE key = ?", (key,)
                ).fetchone()
                if row is not None:
                    found[key] = row[0]
                    if row[1] < now - _FRESH_S:
                        stale.append((key,))
            if stale:
                with self._transaction():
                    self._connection.executemany(
                        f"UPDATE replies SET used = {now} WHERE key = ?", stale
                    )
        return [found.get(key) for key in keys]

    def put(self, model: str, replies: Sequence[tuple[bytes, str]]) -> None:
        """Stores replies, all or none of them; a key that exists keeps its reply."""
        now = int(time.time())
        rows = [(key, model, reply, len(key) + len(reply.encode()), now) for key, reply in replies]
        with self._lock, self._sound(), self._transaction():
            self._connection.executemany(
                "INSERT INTO replies VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING", rows
            )
            if self._held() > self._max_bytes:
                self._evict(self._held() - int(_SPARED * self._max_bytes))

    def held(self) -> list[Held]:
        """What the cache holds, by model."""
        with self._lock, self._sound():
            rows = self._connection.execute(
                "SELECT model, COUNT(*), SUM(size) FROM replies GROUP BY model ORDER BY model"
            ).fetchall()
        return [Held(*row) for row in rows]

    def clear(self, model: str | None = None) -> None:
        """Drops the replies of a model, or all replies, and shrinks the file."""
        where, values = ("", ()) if model is None else (" WHERE model = ?", (model,))
        with self._lock, self._sound():
            with self._transaction():
                self._connection.execute(f"DELETE FROM replies{where}", values)
            self._connection.execute("VACUUM")

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def _held(self) -> int:
        return int(self._connection.execute("SELECT bytes FROM held").fetchone()[0])

    def _evict(self, excess: int) -> None:
        dropped: list[tuple[bytes]] = []
        with closing(
            self._connection.execute("SELECT key, size FROM replies ORDER BY used, key")
        ) as oldest:
            for key, size in oldest:
                if excess <= 0:
                    break
                dropped.append((key,))
                excess -= size
        self._connection.executemany("DELETE FROM replies WHERE key = ?", dropped)

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Reports a file that was damaged after it was opened."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # busy, or a full disk
                raise
            raise UserError(
                f"the frozen LM's cache {self._path} is damaged ({error}): remove the file and run "
                "the same command again; only replies that can be asked for again are lost"
            ) from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Takes the write lock at once: of two that read first and write later, one would fail."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _statements(script: str) -> list[str]:
    statements, pending = [], ""
    for line in script.splitlines():
        pending += line + "\n"
        if sqlite3.complete_statement(pending):
            statements.append(pending)
            pending = ""
    return statements
