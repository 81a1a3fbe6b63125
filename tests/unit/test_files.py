"""Files and folders are there complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lmcot.files import finished_folder, open_private, private_folder, write_atomically
from lmcot.frozen.cache import ReplyCache


def fill(folder: Path, text: str) -> None:
    with finished_folder(folder) as partial:
        assert partial.parent == folder.parent
        (partial / "a").write_text(text, encoding="utf-8")


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with finished_folder(folder) as partial:
        (partial / "a").touch()
        assert not folder.exists()
    assert os.listdir(folder.parent) == ["folder"]
    assert os.listdir(folder) == ["a"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    fill(folder, "new")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(folder) == ["a"]


def test_a_folder_that_another_process_made_meanwhile_may_stay(tmp_path: Path) -> None:
    """Who reads the first one never sees it replaced."""
    folder = tmp_path / "folder"
    with finished_folder(folder, replaces=False) as partial:
        (partial / "a").touch()
        fill(folder, "first")
        with folder.joinpath("a").open(encoding="utf-8") as first:
            seen = os.fstat(first.fileno()).st_ino
    assert (folder / "a").stat().st_ino == seen
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("before", [False, True])
def test_an_error_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    folder = tmp_path / "folder"
    if before:
        fill(folder, "before")

    def interrupted(self: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", interrupted)
    with pytest.raises(KeyboardInterrupt), finished_folder(folder) as partial:
        (partial / "b").touch()
    assert os.listdir(tmp_path) == (["folder"] if before else [])
    if before:
        assert (folder / "a").read_text(encoding="utf-8") == "before"


def test_a_failing_exchange_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    fill(folder, "before")
    rename = os.replace

    def fails_on_arrival(source: Any, target: Any) -> None:
        if target == folder and "replaced" not in str(source):
            raise OSError(errno.ENOSPC, "no space left")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails_on_arrival)
    with pytest.raises(OSError, match="no space left"):
        fill(folder, "after")
    assert os.listdir(tmp_path) == ["folder"]
    assert (folder / "a").read_text(encoding="utf-8") == "before"


def test_two_writers_at_once_leave_the_folder_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    rename = os.replace
    others = ["first", "second"]

    def another_comes_in_between(source: Any, target: Any) -> None:
        if target == folder and others:
            folder.mkdir()
            (folder / "a").write_text(others.pop(0), encoding="utf-8")
        rename(source, target)

    monkeypatch.setattr(os, "replace", another_comes_in_between)
    fill(folder, "last")
    assert not others
    assert os.listdir(tmp_path) == ["folder"]
    assert (folder / "a").read_text(encoding="utf-8") == "last"


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "é\n")
    write_atomically(path, "ü\n")
    assert path.read_text(encoding="utf-8") == "ü\n"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_file_stays_as_it_was_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "before")

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "after")
    assert path.read_text(encoding="utf-8") == "before"
    assert os.listdir(tmp_path) == ["file.txt"]


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_private_files_are_their_owners_alone(tmp_path: Path) -> None:
    """Whatever the umask, and also if they were open to all before."""
    before = os.umask(0)
    try:
        write_atomically(tmp_path / "new", "text", private=True)
        old = tmp_path / "old"
        old.write_text("a line\n", encoding="utf-8")
        assert mode_of(old) == 0o666
        with open_private(old, "ab") as file:
            file.write(b"another\n")
        private_folder(tmp_path / "cache" / "deep")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "new") == mode_of(old) == 0o600
    assert old.read_text(encoding="utf-8") == "a line\nanother\n"
    assert mode_of(tmp_path / "cache") == mode_of(tmp_path / "cache" / "deep") == 0o700


def test_the_reply_cache_is_its_owners_alone(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "folder" / "replies.sqlite", 2**20)
    files = list((tmp_path / "folder").iterdir())
    assert {mode_of(one) for one in files} == {0o600}
    assert mode_of(tmp_path / "folder") == 0o700
    del cache
