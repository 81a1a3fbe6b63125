"""Reading question files: plain or gzipped, JSON lines or one JSON array, record by record."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Literal, cast

from lmcot.data.formats import BadRecord
from lmcot.errors import UserError

Layout = Literal["lines", "array"]
Located = tuple[str, object]
"""Where a record stands, and its JSON value; a `BadRecord` in place of a line that is not JSON."""

_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


def read_records(path: Path, layout: Layout | None = None) -> Iterator[Located]:
    """The records of a file, one at a time; ``layout`` refuses a file that is laid out otherwise.

    Raises:
        UserError: if the file cannot be read, is not laid out as asked, or is a broken JSON array.
    """
    with _opened(path) as stream:
        start = stream.peek(64).removeprefix(_BOM).lstrip()
        found: Layout = "array" if start.startswith(b"[") else "lines"
        if layout is not None and start and found != layout:
            wanted = "one JSON array" if layout == "array" else "JSON lines"
            raise UserError(f"{path} is not {wanted}, as its format asks: set the format to 'auto'")
        yield from _array(stream, path) if found == "array" else _lines(stream, path)


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as raw:
            zipped = raw.peek(2).startswith(_GZIP_MAGIC)
            yield cast(BufferedReader, gzip.GzipFile(fileobj=raw)) if zipped else raw
    except FileNotFoundError:
        raise UserError(f"the file '{path}' does not exist: check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path} is a broken gzip file: fetch it again") from None
    except OSError as error:
        raise UserError(f"the file '{path}' cannot be read ({error.strerror or error})") from None


def _lines(stream: BufferedReader, path: Path) -> Iterator[Located]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(_BOM).strip()
        if line:
            yield f"{path}:{number}", _decode(line)


def _decode(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRecord("the line is not UTF-8 text")
    except json.JSONDecodeError as error:
        return BadRecord(f"the line is not valid JSON ({error.msg} at column {error.colno})")
    except (RecursionError, ValueError):
        return BadRecord("the line is JSON nested too deeply, or with a number of too many digits")


def _array(stream: BufferedReader, path: Path) -> Iterator[Located]:
    # Decoded record by record: the official files are large, and a limit may need only a few.
    try:
        text = stream.read().removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert it") from None
    try:
        for number, value in enumerate(_elements(text), 1):
            yield f"{path}: {describe_record(number, value)}", value
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}): mend the file or fetch it again"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is JSON nested too deeply: mend the file") from None


def _elements(text: str) -> Iterator[object]:
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    if text[position : position + 1] != "]":
        while True:
            value, position = decoder.raw_decode(text, position)
            yield value
            position = _skip_space(text, position)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
            position = _skip_space(text, position + 1)
    end = _skip_space(text, position + 1)
    if end < len(text):
        raise json.JSONDecodeError("text after the array", text, end)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def describe_record(number: int, value: object) -> str:
    """Names a record by its place (from 1) and its id, if it has one."""
    identity = value.get("_id", value.get("id")) if isinstance(value, dict) else None
    return f"record {number} (id '{identity}')" if identity else f"record {number}"
