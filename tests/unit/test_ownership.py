"""The marks of a run's owners: of those that make one at the same time, one succeeds."""

from __future__ import annotations

import errno
import json
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lmcot import ownership as module
from lmcot.errors import UserError
from lmcot.ownership import MARKS, Claim, Mark, OwnedElsewhere, claim, newest_mark
from lmcot.storage import place, remove, write_whole


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.05)
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)


@pytest.fixture(params=["disk", "memory"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return tmp_path if request.param == "disk" else place(f"memory://{uuid.uuid4().hex}/run")


def mark(pid: int = 1) -> Mark:
    return Mark(uuid.uuid4().hex, "a-host", "/a/folder", pid)


def test_a_claim_holds_until_the_next_one(home: Any) -> None:
    assert newest_mark(home) == (0, None)
    one = mark()
    first = claim(home, 1, one)
    assert newest_mark(home) == (1, one)
    first.check()
    with pytest.raises(OwnedElsewhere, match="process 1 on a-host has just taken the run"):
        claim(home, 1, mark(2))
    first.check()
    second = claim(home, 2, mark(2))
    second.check()
    with pytest.raises(OwnedElsewhere, match="process 2 on a-host has taken over"):
        first.check()
    assert newest_mark(home)[0] == 2


def test_of_those_that_come_at_once_one_gets_it(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def race(number: int) -> Claim | None:
        together.wait()
        try:
            return claim(tmp_path, 1, mark(number))
        except OwnedElsewhere:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = [one for one in pool.map(race, range(8)) if one is not None]
    assert len(found) == 1
    assert [path.name for path in (tmp_path / MARKS).iterdir()] == ["000001.json"]


def test_a_file_system_without_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    claim(tmp_path, 1, mark()).check()
    with pytest.raises(OwnedElsewhere):
        claim(tmp_path, 1, mark(2))


def test_a_run_that_was_removed_is_not_written_to_again(home: Any) -> None:
    one = claim(home, 1, mark())
    remove(home / MARKS)
    with pytest.raises(UserError, match="was removed: run the same command again"):
        one.check()


class Store:
    """Stands in for an S3 file system: a dict, and what goes wrong with the next requests."""

    def __init__(self, *wrong: Exception | None, ignores: bool = False) -> None:
        self.files: dict[str, bytes] = {}
        self.wrong = list(wrong)
        self.ignores = ignores

    def pipe_file(self, path: str, content: bytes, mode: str = "overwrite") -> None:
        wrong = self.wrong.pop(0) if self.wrong else None
        if wrong is not None and wrong.args[0] != "after":
            raise wrong
        if mode == "create" and path in self.files and not self.ignores:
            raise FileExistsError(path)
        self.files[path] = content
        if wrong is not None:
            raise wrong


def create(store: Store, one: Mark, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Makes the first mark in a store, as `claim` does at a URL."""

    class File:
        fs, path, protocol = store, "run/.owner/000001.json", "s3"

    def there(home: Any, number: int) -> Mark | None:
        text = store.files.get(File.path)
        return Mark(**json.loads(text)) if text else None

    monkeypatch.setattr(module, "read_mark", there)
    content = json.dumps(asdict(one)).encode()
    file: Any = File()
    home: Any = "s3://run"
    return module._made(lambda: module._create_at_url(file, content), home, 1, one)


def test_an_attempt_whose_answer_was_lost_finds_its_own_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert create(Store(ConnectionError("after")), mark(), monkeypatch)


def test_two_that_the_store_refused_both_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = OSError(errno.EBUSY, "ConditionalRequestConflict")
    assert create(Store(busy, busy), mark(), monkeypatch)
    with pytest.raises(OSError, match="Conflict"):
        create(Store(*[busy] * 5), mark(), monkeypatch)


@pytest.mark.parametrize(
    "store", [Store(OSError(errno.ENOSYS, "NotImplemented")), Store(ignores=True)]
)
def test_a_store_that_knows_no_conditions_is_told_apart(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not create(store, mark(), monkeypatch), "another process may replace the mark"


def test_a_mark_that_was_replaced_is_a_lost_race(home: Any) -> None:
    one = claim(home, 1, mark())
    other = mark(2)
    write_whole(home / MARKS / "000001.json", json.dumps(asdict(other)))
    with pytest.raises(OwnedElsewhere, match="process 2"):
        one.check()
