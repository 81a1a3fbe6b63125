"""Writes files and folders so that they are complete or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from lmcot.errors import UserError

if TYPE_CHECKING:
    from upath import UPath


def cache_folder() -> Path:
    """The folder on this node's disk for converted models and the frozen LM's replies.

    ``$LMCOT_CACHE``, else ``~/.cache/lmcot``.

    Raises:
        UserError: if it cannot be written.
    """
    asked = os.environ.get("LMCOT_CACHE")
    folder = Path(os.path.expanduser(asked or "~/.cache/lmcot")).absolute()
    if can_write(folder):
        return folder
    if asked:
        why = "LMCOT_CACHE names it: set it to another folder"
    else:
        home = os.environ.get("HOME", "not set")
        why = f"HOME is {home}: set LMCOT_CACHE to a folder that can be written, or HOME to another"
    raise UserError(f"lmcot's cache '{folder}' cannot be written ({why})")


def can_write(folder: Path) -> bool:
    """Whether a folder can be written to or made, tried by an unnamed file in the nearest existing
    folder."""
    whole = folder.absolute()
    there = next(one for one in (whole, *whole.parents) if os.path.exists(one))
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


@contextmanager
def finished_folder(folder: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Gives a temporary folder to fill, and puts it in ``folder``'s place at the end.

    On an error the temporary folder is removed and ``folder`` stays as it was. Where several
    processes write the same folder at once, the last one to finish stays.

    Args:
        replaces: if not, the first one to finish stays, so that nobody who reads it sees it go.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if replaces:
            while not _put_in_place(partial, folder):
                pass
        else:
            _put_if_absent(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_if_absent(partial: Path, folder: Path) -> None:
    try:
        os.rename(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _put_in_place(partial: Path, folder: Path) -> bool:
    """Replaces a folder by renaming; False if another process came in between."""
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-old-", dir=folder.parent, ignore_cleanup_errors=True
    ) as out_of_the_way:
        old = Path(out_of_the_way) / "replaced"
        with suppress(FileNotFoundError):
            os.replace(folder, old)
        try:
            os.replace(partial, folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            if old.exists():
                os.replace(old, folder)
            raise
    return True


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Writes a file through a temporary one, so that no reader sees half of it.

    Args:
        private: for questions, prompts and replies: only the file's owner may read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if private:
            open_private(partial, "wb").close()
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_private(path: Path, mode: Literal["wb", "ab"]) -> BinaryIO:
    """Opens a file that only its owner may read, even if it existed before."""
    how = os.O_APPEND if mode == "ab" else os.O_TRUNC
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o600), mode)
    with suppress(PermissionError):  # another user's file, whose mode that user decides
        os.fchmod(file.fileno(), 0o600)
    return file


def drop_cut_line(path: Path) -> None:
    """Takes a last line that a kill cut short off a file, so that further lines can follow."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        write_atomically(path, whole, private=True)


def private_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, for its owner alone."""
    for one in (*reversed(folder.parents), folder):
        one.mkdir(mode=0o700, exist_ok=True)


def read_object(path: Path | UPath, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds; empty if there is no file.

    Args:
        remedy: what to do if the file is damaged.

    Raises:
        UserError: if the file cannot be read, or does not hold a JSON object.
    """
    try:
        return _object(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"the file '{path}' is damaged ({_shortly(error)}): {remedy}") from None


def read_lines(
    path: Path, remedy: str, *, whole: bool = False, needed: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; none if there is no file.

    A last line that a kill cut short is left out.

    Args:
        remedy: what to do if another line is damaged.
        whole: the file was written at once, so that its last line cannot have been cut short.
        needed: keys that each object must have.

    Raises:
        UserError: if the file cannot be read, or a line holds something else.
    """
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"the file '{path}' cannot be read ({error.strerror})") from None
    if whole and tail:
        lines, tail = [*lines, tail], b""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(whole_object(line, needed))
        except ValueError as error:
            raise UserError(
                f"line {number} of '{path}' is damaged ({_shortly(error)}): {remedy}"
            ) from None
    with suppress(ValueError):
        found.append(_object(tail))
    return found


def whole_object(text: bytes, needed: Collection[str]) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        ValueError: if it holds something else, or a key is missing.
    """
    found = _object(text)
    if missing := [key for key in needed if key not in found]:
        raise ValueError(f"it has no '{missing[0]}'")
    return found


def _object(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _shortly(error: Exception) -> str:
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
