"""Files of questions: the files that a path names, and their unpacked bytes."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from lmcot.errors import UserError
from lmcot.storage import fetched, is_remote, matching

_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_NO_QUESTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that the `datasets` library writes beside the questions."""
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_OTHERS = {
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
}
_BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile)
_BUFFER = 1 << 16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def question_files(path: str) -> list[Path]:
    """The files that a path names, on this machine's disk: one, a folder's, or a pattern's; sorted.

    Raises:
        UserError: if there are no such files, or they belong to several splits.
    """
    found = matching(path)
    local = [fetched(one) if is_remote(one) else one for one in found]
    if len(local) == 1 and local[0].is_dir():
        folder = local[0]
        _refuse_a_saved_dict(folder)
        local = sorted(one for one in folder.iterdir() if _may_hold_questions(one))
        if not local:
            raise UserError(
                f"the folder '{path}' holds no file of questions ({', '.join(_SUFFIXES)}, packed "
                "or not): name the folder below it, or a pattern such as 'folder/**/*.jsonl'"
            )
    files = [one for one in local if not one.is_dir()]
    if not files:
        raise UserError(f"the file '{path}' does not exist: check the path")
    splits = {_SPLITS[word] for one in files for word in _words(one) if word in _SPLITS}
    if len(files) > 1 and len(splits) > 1:
        raise UserError(
            f"'{path}' holds files of several splits ({', '.join(sorted(splits))}): name one file, "
            "or a pattern such as 'folder/train*'"
        )
    return files


def _words(file: Path) -> list[str]:
    return re.split(r"[^a-z]+", file.name.lower())


def _may_hold_questions(file: Path) -> bool:
    name = file.name.lower()
    if name.startswith((".", "_")) or name in _NO_QUESTIONS or not file.is_file():
        return False
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return name.endswith(_SUFFIXES)


def _refuse_a_saved_dict(folder: Path) -> None:
    if (folder / "dataset_dict.json").is_file():
        names = sorted(one.name for one in folder.iterdir() if one.is_dir())
        raise UserError(
            f"'{folder}' holds several splits, as the datasets library saves them: name the folder "
            f"of one ({', '.join(names)})"
        )


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A file's bytes, unpacked.

    Raises:
        UserError: if it cannot be read, is damaged, or is of a kind that cannot hold questions.
    """
    kind = None
    try:
        with path.open("rb") as raw:
            start = raw.read(512)
            raw.seek(0)
            kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
            with _unpacked(raw, kind, path) as stream:
                _refuse_other_kinds(stream.peek(512), path)
                yield stream
    except FileNotFoundError:
        raise UserError(f"the file '{path}' does not exist: check the path") from None
    except _BROKEN as error:
        raise UserError(
            f"{path} is a broken {kind} file ({_said(error)}): fetch it again"
        ) from None
    except OSError as error:
        if kind is not None and error.errno is None:
            text = f"{path} is a broken {kind} file ({_said(error)}): fetch it again"
            raise UserError(text) from None
        raise UserError(f"the file '{path}' cannot be read ({error.strerror or error})") from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _unpacked(raw: IO[bytes], kind: str | None, path: Path) -> Iterator[io.BufferedReader]:
    if kind is None:
        yield cast(io.BufferedReader, raw)
    elif kind == "zip":
        with zipfile.ZipFile(raw) as archive:
            yield _buffered(archive.open(_only_member(archive, path)))
    elif kind == "zstd":
        import pyarrow  # heavy, and needed for this kind only

        yield _buffered(pyarrow.CompressedInputStream(raw, "zstd"))
    else:
        kinds = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}
        unpack: Callable[..., object] = kinds[kind]
        yield _buffered(unpack(raw) if kind != "gzip" else unpack(fileobj=raw))


def _buffered(stream: object) -> io.BufferedReader:
    return io.BufferedReader(cast(io.RawIOBase, stream), _BUFFER)


def _only_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    members = [
        one
        for one in archive.infolist()
        if not one.is_dir() and not one.filename.startswith(("__MACOSX/", "."))
    ]
    if len(members) != 1:
        names = ", ".join(one.filename for one in members[:5])
        raise UserError(f"{path} is a zip archive of {len(members)} files ({names}): unpack it")
    if members[0].flag_bits & 1:
        raise UserError(f"{path} is a zip archive with a password: unpack it")
    return members[0]


def _refuse_other_kinds(start: bytes, path: Path) -> None:
    found = next((name for magic, name in _OTHERS.items() if start.startswith(magic)), None)
    if start[257:262] == b"ustar":
        found = "a tar archive"
    if start.startswith(b"PK\x03\x04"):
        found = "a zip archive in another archive"
    if found is not None:
        raise UserError(
            f"{path} is {found}, which is not a file of questions: give JSON lines, "
            "a JSON array, CSV, TSV or parquet, packed or not (see docs/data.md)"
        )
    if start.startswith(b"version https://git-lfs."):
        raise UserError(f"{path} is a pointer of Git LFS, not the file: run 'git lfs pull'")
    if re.match(rb"\s*<(?:!doctype|html|\?xml)", start, re.IGNORECASE):
        raise UserError(f"{path} is a page of HTML or XML, not a file of questions: fetch it again")


def as_utf8(stream: io.BufferedReader, path: Path) -> io.BufferedReader:
    """The stream without a byte order mark; text of another Unicode encoding becomes UTF-8.

    Raises:
        UserError: if it is binary, or not valid in the encoding that its first bytes announce.
    """
    start = stream.peek(4)[:4]
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return stream
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    if encoding is None and b"\x00" in start[:2]:  # JSON and tables begin with ASCII characters
        encoding = "utf-16-be" if start[:1] == b"\x00" else "utf-16-le"
    if encoding is None:
        if b"\x00" in stream.peek(_BUFFER):
            raise UserError(
                f"{path} is a binary file of an unknown kind: give JSON lines, a JSON array, CSV, "
                "TSV or parquet, packed or not (see docs/data.md)"
            )
        return stream
    try:
        text = stream.read().decode(encoding)
    except UnicodeDecodeError:
        raise UserError(
            f"{path} begins like {encoding.upper()} text, but is not: convert it to UTF-8"
        ) from None
    return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(text.encode("utf-8", "replace"))))
