"""Files whose fields have other names, as the settings map them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lmcot.config.data import Columns, FileData
from lmcot.data import load_examples
from lmcot.data.columns import value_at
from lmcot.errors import UserError
from lmcot.records import Example

COLUMNS = Columns(
    question="q", answer="gold.text", context="wiki.pages", id="meta.key", type="kind"
)
RECORD: dict[str, Any] = {
    "q": "Where is Velm?",
    "question": "no",
    "gold": [{"text": "Oster"}, {"text": "the Oster"}],
    "answer": "a prediction",
    "wiki": {"pages": [{"title": "Velm", "sentences": ["Velm is in Oster."]}]},
    "context": "another one",
    "meta": {"key": "k1"},
    "id": "7",
    "kind": "bridge",
}
FOUND = ("k1", "Where is Velm?", "Oster", ("the Oster",), "bridge", "Velm")


def read(path: Path, columns: Columns = COLUMNS) -> list[Example]:
    return load_examples(FileData(kind="file", path=str(path), columns=columns)).examples


def told(one: Example) -> tuple[object, ...]:
    return one.id, one.question, one.answer, one.aliases, one.type, one.context[0].title


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(RECORD) + "\n",
        json.dumps([RECORD], indent=1),
        json.dumps({"data": [RECORD]}),
        json.dumps({"version": 1, "all": [RECORD]}),
    ],
    ids=["lines", "array", "wrapped", "wrapped by another key"],
)
def test_columns_are_found_in_each_layout(tmp_path: Path, written: str) -> None:
    (tmp_path / "q.json").write_text(written)
    assert [told(one) for one in read(tmp_path / "q.json")] == [FOUND]


def test_columns_of_tables(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([RECORD | {"context": None}]), tmp_path / "q.pq")
    assert [told(one) for one in read(tmp_path / "q.pq")] == [FOUND]
    named = Columns(question="Query Text", answer="Gold", context="Docs")
    (tmp_path / "q.csv").write_text(
        'Query Text;Gold;Docs\nWhere is Velm?;"[""Oster""]";Velm. Oster.\n'
    )
    (one,) = read(tmp_path / "q.csv", named)
    assert (one.question, one.answer, len(one.context)) == ("Where is Velm?", "Oster", 1)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("q", "Where is Velm?"),
        ("gold.text", ["Oster", "the Oster"]),
        ("gold.1.text", "the Oster"),
        ("wiki.pages.0.title", "Velm"),
        ("spelt.a", [1]),
        ("dotted.name", 2),
    ],
)
def test_paths(path: str, value: object) -> None:
    record = RECORD | {"spelt": '[{"a": 1}]', "dotted.name": 2}
    assert value_at(record, path) == value


@pytest.mark.parametrize(
    ("lost", "named"),
    [("q", "question"), ("gold", "answer"), ("wiki", "context")],
)
def test_a_record_that_lacks_a_column_is_bad(tmp_path: Path, lost: str, named: str) -> None:
    record = {name: value for name, value in RECORD.items() if name != lost}
    (tmp_path / "q.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=rf"q\.jsonl:2: the column '{lost}.*columns\.{named} names"):
        read(tmp_path / "q.jsonl")


def test_a_table_without_the_column_names_what_it_has(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{"ask": "?"}]), tmp_path / "q.pq")
    with pytest.raises(UserError, match="no column 'q', only ask"):
        read(tmp_path / "q.pq")
    with pytest.raises(UserError, match=r"no column 'question', only ask: say in data's columns"):
        read(tmp_path / "q.pq", Columns())
