"""`lmcot data`: what is understood of a file of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmcot.cli import main
from lmcot.config.data import ContextSettings, FileData
from lmcot.tools.describe_data import Range, description, in_words

GOOD: dict[str, Any] = {
    "id": "q1",
    "question": "Where is Velm?",
    "answer": ["Oster", "the Oster"],
    "type": "bridge",
    "context": [["Velm", ["Velm is old.", "Velm is in Oster."]], ["Brann", ["The Brann is long."]]],
    "supporting_facts": [["Velm", 1]],
}
SECOND = {
    "question": "Who dug it?",
    "answer": "Ott",
    "context": [["Brann", ["Ott dug the Brann in a very dry year."]]],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (GOOD, SECOND, {"question": "?"})))
    return file


def test_what_is_counted(path: Path) -> None:
    def words(text: str) -> int:
        return len(text.split())

    source = FileData(kind="file", path=str(path))
    found = description(source, words, ContextSettings(max_tokens=5), show=0)
    assert (found.questions, found.bad, found.without_id) == (2, 1, 1)
    assert (found.with_facts, found.with_aliases, found.types) == (1, 1, {"bridge": 1})
    assert found.passages == Range(1, 1.5, 2)
    assert found.lengths["question"] == Range(3, 3, 3)
    assert found.lengths["supporting facts"] == Range(0, 2, 4)
    assert found.problems == [f"{path}:3: the field 'answer' is missing"]
    assert found.cut == 2
    assert found.facts_cut == 1, "the whole context of the first has 11 words"


def test_distractors_that_are_not_shown_are_not_cut(path: Path) -> None:
    def words(text: str) -> int:
        return len(text.split())

    source = FileData(kind="file", path=str(path))
    found = description(source, words, ContextSettings(distractors=0, max_tokens=10), show=0)
    assert (found.cut, found.facts_cut) == (0, 0)


def test_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(path)]) == 0
    told = capsys.readouterr().out
    assert f"{path}: 2 questions, 1 bad records" in told
    assert "q1 (bridge): Where is Velm?" in told
    assert "right answers: Oster; the Oster" in told
    assert "   * Velm is in Oster." in told
    assert main(["data", str(path), "--json", "--show", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 2


def test_the_data_of_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--config", "configs/smoke_t5.yaml", "--show", "0"]) == 0
    told = capsys.readouterr().out
    assert told.count("tokens of the small LM") >= 6
    assert told.count("contexts are cut to it") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a file, or give --config FILE"),
        (["FILE", "--show", "-1"], "--show is -1"),
        (["FILE", "--column", "answer"], "--column 'answer' is not of the form FIELD=NAME"),
        (["FILE", "--column", "gold=a"], "--column names the field 'gold', but there is only que"),
        (["FILE", "--column", "question=q"], "columns.question names"),
        (["nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
    ],
)
def test_what_is_wrong_is_told(
    path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(path) if one == "FILE" else one for one in arguments]
    assert main(["data", *given]) == 2
    assert said in capsys.readouterr().err


def test_long_sentences_are_shown_in_part(path: Path) -> None:
    path.write_text(json.dumps(GOOD | {"question": "x" * 500}) + "\n")
    told = in_words(description(FileData(kind="file", path=str(path)), None, None, show=1))
    assert "x" * 157 + "..." in told
    assert "x" * 158 not in told
