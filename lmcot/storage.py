"""Access to folders and files on this machine's disk or at a URL that fsspec knows (s3://, ...).

A `Place` is a `pathlib.Path` or, for a URL, a `UPath`, which behaves like one. Libraries that need
real files (DeepSpeed, transformers) work in a folder on this node's disk, whose content is fetched
before, or uploaded when it is complete.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lmcot.errors import UserError
from lmcot.files import cache_folder, finished_folder, private_folder, write_atomically

if TYPE_CHECKING:
    from typing_extensions import TypeIs
    from upath import UPath

    Place = Path | UPath

_Result = TypeVar("_Result")
PATIENCE_S = 180.0
"""Seconds for which a store may fail before what was asked of it fails."""
_LONGEST_PAUSE_S = 15.0
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""These protocols have no folders; and fsspec caches their listings, which miss others' writes."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of lmcot that a protocol needs."""
_LEAST_COPIED, _MOST_COPIED = 5 * 2**20, 5 * 2**30
"""Sizes of what S3 takes as the first part of an upload from a file that it has already."""
_APPENDING = frozenset({"memory", "sftp", "ssh", "hdfs", "webhdfs"})
"""Protocols of file systems that write at a file's end."""
_MISTAKES = (TypeError, AttributeError, LookupError, NameError, AssertionError)
"""Errors of a program, unlike storage's, which are of many types, some plain `Exception`."""
_VERSION_KEYS = ("ETag", "etag", "generation", "mtime", "LastModified", "created")
"""Keys under which file systems give a file's version; the first one present counts."""


def is_url(text: str) -> bool:
    """Whether a path is a URL."""
    return _URL.match(text) is not None


def local_path(text: str | Path) -> Path:
    """A path on this machine's disk; ``~`` at its beginning is a home folder.

    Raises:
        UserError: if there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"'{text}' names a home folder that is not known here: write the whole path"
        ) from None


def place(text: str | Place) -> Place:
    """A path, as `local_path` reads it, or the place that a URL names.

    Raises:
        UserError: if no installed package can open such a URL.
    """
    if isinstance(text, Path) or (isinstance(text, str) and not is_url(text)):
        return local_path(text)
    if not isinstance(text, str):
        return text
    from upath import UPath

    protocol = text.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False} if protocol in _OBJECT_STORES else {}
    try:
        found = UPath(text.rstrip("/"), **options)
        _ = found.fs
    except (ImportError, ValueError) as error:
        remedy = (
            f"pip install 'lmcot[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS
            else "is it a protocol that fsspec knows, and is its package installed?"
        )  # fmt: skip
        raise UserError(f"'{text}' cannot be opened ({error}): {remedy}") from None
    return found


def matching(text: str) -> list[Place]:
    """The places that a path names: itself if it exists, else the sorted matches of a pattern.

    Patterns are as in the shell: ``*``, ``?``, ``[...]``, and ``**`` for folders of any depth; at
    a URL, ``*`` and ``**``. A URL without a pattern is taken to exist.

    Raises:
        UserError: if the place cannot be reached.
    """
    where = place(text)
    if is_remote(where):
        if "*" not in text:
            return [where]
        with reaching(where):
            names = sorted(where.fs.glob(where.path))
        return [place(where.fs.unstrip_protocol(name)) for name in names]
    if where.exists():
        return [where]
    return [Path(name) for name in sorted(glob.glob(str(where), recursive=True))]


def is_remote(one: Place) -> TypeIs[UPath]:
    """Whether a place is at a URL."""
    return not isinstance(one, Path)


class Unreachable(UserError):
    """Storage that did not answer, or failed: a later attempt may fare better."""


@contextmanager
def reaching(one: Place, *, absent_is_an_error: bool = True) -> Iterator[None]:
    """Turns errors of reading or writing at a URL into a `UserError` that names it.

    Args:
        absent_is_an_error: if not, `FileNotFoundError` stays one.
    """
    try:
        yield
    except (UserError, UnicodeDecodeError, *_MISTAKES):
        raise
    except Exception as error:
        if not is_remote(one) or (isinstance(error, FileNotFoundError) and not absent_is_an_error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise UserError(f"there is nothing at '{one}' ({reason}): check the address") from None
        kind = UserError if isinstance(error, PermissionError) else Unreachable
        raise kind(
            f"'{one}' cannot be reached ({reason}): check the address, the credentials of this "
            "machine, and the network"
        ) from error


def persistently(action: Callable[[], _Result]) -> _Result:
    """The result of an action on storage, which is repeated while storage cannot be reached.

    Raises:
        Unreachable: if it cannot for `PATIENCE_S` seconds.
    """
    deadline, pause, told = time.monotonic() + PATIENCE_S, 1.0, False
    while True:
        try:
            return action()
        except Unreachable as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            if not told:
                told = True
                print(f"{error}; retrying for {left:.0f} s", file=sys.stderr, flush=True)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def versions_of(folder: Place) -> dict[str, tuple[int, str]]:
    """Size and version of each file below a folder, by its name relative to it; sorted."""
    if not is_remote(folder):
        stats = {
            str(path.relative_to(folder)): path.stat()
            for path in folder.rglob("*")
            if path.is_file()
        }
        return {name: (one.st_size, str(one.st_mtime_ns)) for name, one in sorted(stats.items())}
    with reaching(folder):
        found: dict[str, dict[str, Any]] = folder.fs.find(folder.path, detail=True)
        root = len(folder.path.rstrip("/")) + 1
        return {
            name[root:]: (info["size"], _version(info))
            for name, info in sorted(found.items())
            if info.get("type") != "directory"
        }


def _version(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")


def write_whole(file: Place, text: str) -> None:
    """Writes a file so that no reader sees half of it: an object store writes it atomically."""
    if not is_remote(file):
        write_atomically(file, text)
        return
    with reaching(file):
        put(file, text.encode())


def put(file: UPath, content: bytes | Path) -> None:
    """Writes a file at a URL, with the folders above it; the file system's errors pass through."""
    if file.protocol not in _OBJECT_STORES:
        file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.fs.pipe_file(file.path, content)
    else:
        file.fs.put_file(str(content), file.path)


def append(file: UPath, tail: bytes, size: int) -> bool:
    """Adds bytes to a file at a URL without uploading its beginning again, where a store can.

    The store itself puts both together (S3 copies the beginning as the first part of an upload, GCS
    composes objects), so that the file is whole for whoever reads it.

    Args:
        size: of the file so far.

    Returns:
        whether they were added; if not, the whole file is to be uploaded.
    """
    compose = file.protocol in ("gs", "gcs")
    if file.protocol in ("s3", "s3a"):
        if not _LEAST_COPIED <= size <= _MOST_COPIED:
            return False
    elif not compose and file.protocol not in _APPENDING:
        return False
    if file.fs.info(file.path)["size"] != size:
        return False
    if compose:
        part = file.with_name(f".{file.name}.part")
        file.fs.pipe_file(part.path, tail)
        file.fs.merge(file.path, [file.path, part.path])
        file.fs.rm_file(part.path)
    else:
        with file.fs.open(file.path, "ab") as whole:
            whole.write(tail)
    return bool(file.fs.info(file.path)["size"] == size + len(tail))


def remove(one: Place) -> None:
    """Removes a folder with its content, if it exists."""
    if not is_remote(one):
        if one.exists():
            shutil.rmtree(one)
        return
    with reaching(one):
        if one.fs.exists(one.path):
            one.fs.rm(one.path, recursive=True)


def upload(folder: Path, to: UPath) -> None:
    """Uploads all files of a folder below a URL; files with other names stay there.

    A store that fails for a moment is waited for: see `persistently`.
    """
    for name in versions_of(folder):
        persistently(partial(_upload_file, folder / name, to / name))


def _upload_file(file: Path, to: UPath) -> None:
    with reaching(to):
        put(to, file)


def download(source: UPath, folder: Path) -> None:
    """Fetches all files below a URL into a folder."""
    with reaching(source):
        for name in versions_of(source):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            source.fs.get_file((source / name).path, str(target))


@contextmanager
def added_to(folder: Place, before: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Gives a folder on this disk whose files are added to ``folder`` at the end.

    Args:
        before: called before anything is written to ``folder``; what it raises prevents that.
    """
    if not is_remote(folder):
        before()
        yield folder
        return
    with _workspace() as local:
        yield local
        before()
        upload(local, folder)


@contextmanager
def replacing(folder: Place) -> Iterator[Path]:
    """Gives a new folder on this disk, which replaces ``folder`` at the end.

    On a disk that happens at once; at a URL file by file, so that a marker elsewhere should say
    when it is complete.
    """
    if not is_remote(folder):
        with finished_folder(folder) as new:
            yield new
        return
    with _workspace() as local:
        yield local
        persistently(lambda: remove(folder))
        upload(local, folder)


@contextmanager
def on_disk(folder: Place) -> Iterator[Path]:
    """Gives a folder on this disk with the content of ``folder``, while the context is open."""
    if not is_remote(folder):
        yield folder
        return
    with _workspace() as local:
        persistently(lambda: download(folder, local))
        yield local


def fetched(source: UPath) -> Path:
    """This node's copy of the folder or file at a URL, fetched again when it has changed there.

    It stays in the cache; processes of one node fetch it once.

    Raises:
        UserError: if there is nothing, or it cannot be reached.
    """
    from filelock import FileLock

    with reaching(source):
        single = source.is_file()
        versions = {source.name: _of_file(source)} if single else versions_of(source)
    if not versions:
        raise UserError(f"there is nothing at '{source}'")
    copy = _copy_of(source, versions)
    with FileLock(copy.with_name(f".{copy.name}.lock")):
        if not copy.is_dir():
            with finished_folder(copy) as new, reaching(source):
                if single:
                    source.fs.get_file(source.path, str(new / source.name))
                else:
                    download(source, new)
    return copy / source.name if single else copy


def fetched_part(source: UPath, wanted: Callable[[str], bool]) -> Path:
    """This node's copy of a folder at a URL, in which the wanted files are there.

    Processes of one node share it, and fetch each file once.

    Args:
        wanted: whether a file is, by its name relative to the folder.
    """
    from filelock import FileLock

    versions = versions_of(source)
    copy = _copy_of(source, versions, "-part")
    for name in filter(wanted, versions):
        file = copy / name
        private_folder(file.parent)
        with FileLock(file.with_name(f".{file.name}.lock")):
            if not file.exists():
                new = file.with_name(f".{file.name}.partial")
                with reaching(source):
                    source.fs.get_file((source / name).path, str(new))
                os.replace(new, file)
    return copy


def _copy_of(source: UPath, versions: dict[str, tuple[int, str]], kind: str = "") -> Path:
    digest = hashlib.sha256(repr((str(source), versions)).encode()).hexdigest()[:16]
    copy = cache_folder() / "fetched" / f"{source.name}-{digest}{kind}"
    private_folder(copy.parent)
    return copy


def forget(source: UPath) -> None:
    """Removes this node's copies of a URL."""
    for copy in (cache_folder() / "fetched").glob(f"{source.name}-*"):
        shutil.rmtree(copy, ignore_errors=True)


def _of_file(file: UPath) -> tuple[int, str]:
    info = file.fs.info(file.path)
    return info["size"], _version(info)


@contextmanager
def _workspace() -> Iterator[Path]:
    """Gives an empty folder in the cache, whose disk is large enough for models."""
    parent = cache_folder() / "work"
    private_folder(parent)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)
