"""The data format of docs/extending.md reads its files, and tells what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from lmcot.config import FileData
from lmcot.config import data as settings
from lmcot.data import formats, load_examples
from lmcot.errors import UserError
from lmcot.records import Paragraph
from tests.support.worked import python_blocks

RECORD: dict[str, Any] = {
    "qid": "b8677742616fef051f00",
    "term": "Genghis Khan",
    "question": "Are more people today related to Genghis Khan than Julius Caesar?",
    "answer": True,
    "facts": ["Julius Caesar had three children.", "Genghis Khan had sixteen children."],
}


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> type[FileData]:
    """The settings and the table with what the page says to add."""
    name, meaning = python_blocks("A data format")
    names: dict[str, Any] = dict(vars(settings))
    exec(name, names)
    code = "class Extended(FileData):\n    format: FileFormat = 'auto'"
    exec(compile(code, "extended", "exec", dont_inherit=True), names)
    table: dict[str, Any] = dict(vars(formats))
    exec(meaning, table)
    monkeypatch.setitem(formats.FORMATS, "strategyqa", table["STRATEGYQA"])
    assert set(get_args(names["FileFormat"])) == set(formats.FORMATS)
    found: type[FileData] = names["Extended"]
    return found


def source(extended: type[FileData], path: Path) -> FileData:
    values = {"kind": "file", "path": str(path), "format": "strategyqa"}
    return extended.model_validate(values)


def test_its_records_are_read(extended: type[FileData], tmp_path: Path) -> None:
    path = tmp_path / "strategyqa_train.json"
    path.write_text(json.dumps([RECORD, {**RECORD, "qid": "2", "answer": False}]))
    first, second = load_examples(source(extended, path)).examples
    assert (first.id, first.answer, first.dataset) == (RECORD["qid"], "yes", "strategyqa")
    assert second.answer == "no"
    assert [one.sentences for one in first.context] == [(fact,) for fact in RECORD["facts"]]
    assert isinstance(first.context[0], Paragraph)


def test_what_is_wrong_with_a_file_is_told(extended: type[FileData], tmp_path: Path) -> None:
    path = tmp_path / "strategyqa_train.json"
    path.write_text(json.dumps([{k: v for k, v in RECORD.items() if k != "facts"}]))
    with pytest.raises(UserError, match="the field 'facts' is missing"):
        load_examples(source(extended, path))
    path.write_text(json.dumps(RECORD))
    with pytest.raises(UserError, match="is not one JSON array, as its format asks"):
        load_examples(source(extended, path))


def test_each_format_of_the_settings_has_a_meaning() -> None:
    assert set(get_args(settings.FileFormat)) == set(formats.FORMATS)
