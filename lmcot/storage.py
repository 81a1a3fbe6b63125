"""Access to folders and files on this machine's disk or at a URL that fsspec knows (s3://, ...).

A `Place` is a `pathlib.Path` or, for a URL, a `UPath`, which behaves like one. Libraries that need
real files (DeepSpeed, transformers) work in a folder on this node's disk, whose content is fetched
before, or uploaded when it is complete.
"""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcot.errors import UserError
from lmcot.files import cache_folder, finished_folder, private_folder, write_atomically

if TYPE_CHECKING:
    from typing_extensions import TypeIs
    from upath import UPath

    Place = Path | UPath

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""These protocols have no folders; and fsspec caches their listings, which miss others' writes."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of lmcot that a protocol needs."""
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


@contextmanager
def reaching(one: Place) -> Iterator[None]:
    """Turns errors of reading or writing at a URL into a `UserError` that names it."""
    try:
        yield
    except (UserError, UnicodeDecodeError, *_MISTAKES):
        raise
    except Exception as error:
        if not is_remote(one):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise UserError(f"there is nothing at '{one}' ({reason}): check the address") from None
        raise UserError(
            f"'{one}' cannot be reached ({reason}): check the address, the credentials of this "
            "machine, and the network"
        ) from error


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
    """Uploads all files of a folder below a URL; files with other names stay there."""
    with reaching(to):
        for name in versions_of(folder):
            put(to / name, folder / name)


def download(source: UPath, folder: Path) -> None:
    """Fetches all files below a URL into a folder."""
    with reaching(source):
        for name in versions_of(source):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            source.fs.get_file((source / name).path, str(target))


@contextmanager
def added_to(folder: Place) -> Iterator[Path]:
    """Gives a folder on this disk whose files are added to ``folder`` at the end."""
    if not is_remote(folder):
        yield folder
        return
    with _workspace() as local:
        yield local
        upload(local, folder)


@contextmanager
def replacing(folder: Place) -> Iterator[Path]:
    """Gives a new folder on this disk, which replaces ``folder`` at the end.

    On a disk that happens at once; at a URL file by file, so that a marker elsewhere should say
    when it is complete.
    """
    if not is_remote(folder):
        with finished_folder(folder) as partial:
            yield partial
        return
    with _workspace() as local:
        yield local
        remove(folder)
        upload(local, folder)


@contextmanager
def on_disk(folder: Place) -> Iterator[Path]:
    """Gives a folder on this disk with the content of ``folder``, while the context is open."""
    if not is_remote(folder):
        yield folder
        return
    with _workspace() as local:
        download(folder, local)
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
    digest = hashlib.sha256(repr((str(source), versions)).encode()).hexdigest()[:16]
    copy = cache_folder() / "fetched" / f"{source.name}-{digest}"
    private_folder(copy.parent)
    with FileLock(copy.with_name(f".{copy.name}.lock")):
        if not copy.is_dir():
            with finished_folder(copy) as partial, reaching(source):
                if single:
                    source.fs.get_file(source.path, str(partial / source.name))
                else:
                    download(source, partial)
    return copy / source.name if single else copy


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
