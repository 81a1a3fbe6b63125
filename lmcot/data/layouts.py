"""How a file lays out its records: lines, one JSON value, a delimited table, parquet or Arrow.

Memory holds one record at a time, except where a file is one JSON value.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from lmcot.data.files import as_utf8, opened
from lmcot.data.formats import FORMATS, IDENTITIES, QUESTIONS, Format, Layout, holds_question
from lmcot.data.passages import CONTEXTS
from lmcot.data.values import DECODER, BadRecord
from lmcot.errors import UserError

Located = tuple[str, object]
"""The place of a record and its value; a `BadRecord` in place of one that cannot be read."""

_SPACE = re.compile(r"\s*")
_WRAPPERS = ("data", "questions", "examples", "records", "rows", "items", "instances")
"""Keys of an object around records that hold the list of records."""
_DELIMITERS = ",\t;|"
_LONGEST_CELL = 2**31 - 1


def read_records(path: Path, format: Format = FORMATS["auto"]) -> Iterator[Located]:
    """The records of a file, one at a time.

    Raises:
        UserError: if the file cannot be read, or is not laid out in a known way or as the format
            asks.
    """
    layout = format.layout
    with opened(path) as stream:
        start = stream.peek(8)[:8]
        if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
            _check_layout(path, layout, None)
            yield from _table(stream, path, format)
            return
        stream = as_utf8(stream, path)
        first, number = _first_line(stream)
        if first is None:
            return
        lines = enumerate(itertools.chain([first], stream), number)
        begins = first.lstrip()[:1]
        if begins == b"[" or (begins == b"{" and _goes_on(first) and _has_more(stream)):
            _check_layout(path, layout, "array" if begins == b"[" else None)
            yield from _values(b"\n" * (number - 1) + first + stream.read(), path, format)
        elif begins == b"{" or _is_json(first):
            _check_layout(path, layout, "lines")
            yield from _lines(lines, path, format)
        else:
            _check_layout(path, layout, None)
            yield from _delimited(lines, first, path, format)


def describe_record(number: int, value: object) -> str:
    """Names a record by its place (from 1) and its id, if it has one."""
    found = value if isinstance(value, Mapping) else {}
    identity = next((found[name] for name in IDENTITIES if found.get(name)), None)
    return f"record {number} (id '{identity}')" if identity else f"record {number}"


def _check_layout(path: Path, wanted: Layout | None, found: Layout | None) -> None:
    if wanted is not None and found != wanted:
        name = "one JSON array" if wanted == "array" else "JSON lines"
        raise UserError(f"{path} is not {name}, as its format asks: set the format to 'auto'")


def _first_line(stream: io.BufferedReader) -> tuple[bytes | None, int]:
    """The first line that is not blank, and its number."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            return line, number
    return None, 0


def _has_more(stream: io.BufferedReader) -> bool:
    return bool(stream.peek(1))


def _goes_on(line: bytes) -> bool:
    """Whether a line is the beginning of a JSON value that spans several lines."""
    try:
        text = line.decode("utf-8").rstrip()
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (UnicodeDecodeError, RecursionError, ValueError):
        pass
    return False


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# JSON lines


def _lines(lines: Iterator[tuple[int, bytes]], path: Path, format: Format) -> Iterator[Located]:
    for number, line in lines:
        if line.strip():
            yield from _records_in(_decode(line), f"{path}:{number}", path, format)


def renamed(value: object, format: Format) -> object:
    """The value with the known field names, or what is wrong with it."""
    if format.renamed is None or not isinstance(value, Mapping):
        return value
    try:
        return format.renamed(value)
    except BadRecord as problem:
        return problem


def _decode(line: bytes) -> object:
    try:
        return DECODER.decode(line.decode("utf-8").strip())
    except UnicodeDecodeError:
        return BadRecord(
            "the line is not UTF-8 text", "convert the file to UTF-8 (iconv -f LATIN1 -t UTF-8)"
        )
    except json.JSONDecodeError as error:
        problem = f"the line is not valid JSON ({error.msg} at column {error.colno})"
        if not line.endswith(b"\n"):
            return BadRecord(f"{problem}, and the file ends in it", "fetch the file again")
        return BadRecord(problem)
    except (RecursionError, ValueError):
        return BadRecord("the line is JSON nested too deeply, or with a number of too many digits")


# One JSON value, or several over many lines


def _values(content: bytes, path: Path, format: Format) -> Iterator[Located]:
    # Decoded record by record: the official files are large, and a limit may need only a few.
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 text (line {line}): convert it (iconv -f LATIN1 -t UTF-8)"
        ) from None
    numbers = itertools.count(1)
    try:
        for value in _elements(text) if text.lstrip()[:1] == "[" else _concatenated(text):
            for _, record in _records_in(value, "", path, format):
                yield f"{path}: {describe_record(next(numbers), record)}", record
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}): correct the file or fetch it again"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is JSON nested too deeply: correct the file") from None


def _elements(text: str) -> Iterator[object]:
    position = _skip_space(text, text.index("[") + 1)
    if text[position : position + 1] != "]":
        while True:
            value, position = DECODER.raw_decode(text, position)
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


def _concatenated(text: str) -> Iterator[object]:
    position = _skip_space(text, 0)
    while position < len(text):
        value, position = DECODER.raw_decode(text, position)
        yield value
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


# Objects around records


def _records_in(value: object, where: str, path: Path, format: Format) -> Iterator[Located]:
    """The record itself, or the records inside an object around them."""
    value = renamed(value, format)
    found = _inside(value, path)
    if found is None:
        yield where, value
        return
    for number, one in enumerate(found, 1):
        place = f"{where}: " if where else ""
        yield from _records_in(one, f"{place}{describe_record(number, one)}", path, format)


def _inside(value: object, path: Path) -> Sequence[object] | None:
    if not isinstance(value, Mapping):
        return None
    if _is_of_pandas(value):
        numbers = next(iter(value.values()))
        return [{name: column[number] for name, column in value.items()} for number in numbers]
    if holds_question(value):
        return None
    if isinstance(value.get("row"), Mapping):  # the hub's viewer
        return [value["row"]]
    if _is_list_of_objects(value.get("paragraphs")) and "qas" in value["paragraphs"][0]:
        return _of_squad(value)
    if isinstance(next((value[name] for name in QUESTIONS if name in value), None), list):
        return _of_columns(value)
    if value.keys() & {*IDENTITIES, *CONTEXTS}:  # a record that lacks its question
        return None
    for name in _WRAPPERS:
        if value.get(name) == []:
            return []
        if isinstance(value.get("columns"), list) and isinstance(value.get(name), list):
            return [_row(value["columns"], one) for one in value[name]]
        if _is_list_of_objects(value.get(name)):
            return value[name]
        if isinstance(value.get(name), Mapping):
            return [value[name]]
    if value and all(isinstance(one, Mapping) and holds_question(one) for one in value.values()):
        known = set(IDENTITIES)
        return [one if known & one.keys() else {"id": key, **one} for key, one in value.items()]
    lists = [name for name, one in value.items() if _is_list_of_objects(one)]
    if len(lists) > 1:
        raise UserError(
            f"{path} holds several lists of records ({', '.join(lists)}): write each to a file of "
            "its own"
        )
    return value[lists[0]] if lists else None


def _of_squad(article: Mapping[str, Any]) -> list[object]:
    return [
        {"title": article.get("title"), "context": paragraph.get("context"), **question}
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _row(names: Sequence[object], cells: object) -> object:
    if not isinstance(cells, list) or len(cells) != len(names):
        return BadRecord(f"the row is no list of {len(names)} cells, one for each column")
    return dict(zip(names, cells, strict=True))


def _is_of_pandas(value: Mapping[str, Any]) -> bool:
    """Whether it maps columns to numbered rows, as pandas writes a data frame by default."""
    keys = [one.keys() if isinstance(one, Mapping) else None for one in value.values()]
    numbers = keys and keys[0] and all(isinstance(key, str) and key.isdigit() for key in keys[0])
    return bool(numbers) and all(one == keys[0] for one in keys) and _question_in(list(value))


def _of_columns(table: Mapping[str, Any]) -> list[object] | None:
    columns = {name: one for name, one in table.items() if isinstance(one, list)}
    if len({len(one) for one in columns.values()}) > 1:
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_list_of_objects(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


# Tables


def _delimited(
    lines: Iterator[tuple[int, bytes]], first: bytes, path: Path, format: Format
) -> Iterator[Located]:
    header = first.decode("utf-8", "replace")
    delimiter = next(
        (one for one in _DELIMITERS if _question_in(_cells(header, one), format)), None
    )
    if delimiter is None:
        raise UserError(
            f"{path} begins with neither JSON nor the head of a table with a column "
            f"'{format.question or 'question'}': "
            "give JSON lines, a JSON array, CSV, TSV or parquet, packed or not (see docs/data.md)"
        )
    names = [name.strip().lower() for name in _cells(header, delimiter)]
    csv.field_size_limit(_LONGEST_CELL)
    number = next(lines)[0]
    texts = (line.decode("utf-8") for _, line in lines)
    rows = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            where = f"{path}:{number + rows.line_num}"
            if len(row) == len(names):
                cells = {name: cell for name, cell in zip(names, row, strict=True) if cell}
                yield where, renamed(cells, format)
            elif any(row):
                yield where, BadRecord(f"the row has {len(row)} cells, but {len(names)} columns")
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not UTF-8 text (line {number + rows.line_num + 1}): convert it (iconv -f "
            "LATIN1 -t UTF-8)"
        ) from None
    except csv.Error as error:
        raise UserError(
            f"{path} is not a valid table at line {number + rows.line_num} ({error}): check its "
            "quotes"
        ) from None


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _question_in(names: Sequence[str], format: Format = FORMATS["auto"]) -> bool:
    known = (format.question.lower(),) if format.question else QUESTIONS
    known = (*known, *(one.split(".")[0] for one in known))
    return any(name.strip().lower() in known for name in names)


def _table(stream: io.BufferedReader, path: Path, format: Format) -> Iterator[Located]:
    import pyarrow  # heavy, and needed for these files only

    number = itertools.count(1)
    try:
        names, batches = _batches(stream)
        if not _question_in(names, format):
            wanted = format.question or "question"
            raise UserError(
                f"{path} has no column '{wanted}', only {', '.join(names)}: say in "
                "data's columns.question which of them holds the question"
            )
        for batch in batches:
            for row in batch.to_pylist():
                place = f"{path}: {describe_record(next(number), row)}"
                yield place, renamed(row, format)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is a broken parquet or Arrow file ({reason}): fetch it again"
        ) from None


def _batches(stream: io.BufferedReader) -> tuple[list[str], Iterator[Any]]:
    """The names of a table's columns, and its rows in batches."""
    import pyarrow
    from pyarrow import ipc, parquet

    start = stream.peek(6)[:6]
    source = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
    if start.startswith(b"PAR1"):
        file = parquet.ParquetFile(source)
        return file.schema_arrow.names, file.iter_batches(batch_size=256)
    if start == b"ARROW1":
        reader = ipc.open_file(source)
        indices = range(reader.num_record_batches)
        return reader.schema.names, (reader.get_batch(index) for index in indices)
    reader = ipc.open_stream(source)
    return reader.schema.names, iter(reader)
