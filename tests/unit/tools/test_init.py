"""`lmcot init`: settings for a file of questions, two models and this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmcot.cli import main
from lmcot.config import Config, load_config
from lmcot.config.data import FileData
from lmcot.config.frozen import OpenAIFrozen, TransformersFrozen
from lmcot.data import load_examples

RECORD: dict[str, Any] = {
    "question": "Where is Velm?",
    "answer": "Oster",
    "context": [["Velm", ["Velm is old.", "Velm is in Oster."]]],
    "supporting_facts": [["Velm", 1]],
}


def written(folder: Path, record: dict[str, Any], count: int = 40) -> str:
    path = folder / "mine, all.jsonl"
    lines = [json.dumps(record | {"id": str(n), "question": f"{n}?"}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def made(folder: Path, data: str, *options: str, large: str = "random:llama") -> Config:
    output = folder / "made.yaml"
    given = ["--data", data, "--small", "random:llama", "--large", large, "--output", str(output)]
    assert main(["init", *given, *options]) == 0
    return load_config(str(output), [])


def test_one_file_and_two_local_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path, RECORD)
    config = made(tmp_path, data)
    told = capsys.readouterr().out
    assert f"lmcot train --config {tmp_path / 'made.yaml'} --run-dir runs/made" in told
    assert isinstance(config.frozen, TransformersFrozen)
    assert config.teacher is not None
    assert config.teacher.kind == "supporting_facts"
    assert isinstance(config.data.train, FileData)
    assert config.data.train.path == data
    parts = [load_examples(one).examples for one in (config.data.train, config.data.validation)]
    assert len(parts[0]) + len(parts[1]) == 40
    assert parts[1]


def test_an_endpoint_and_questions_without_facts(tmp_path: Path) -> None:
    data = written(tmp_path, {name: RECORD[name] for name in ("answer", "context")})
    config = made(
        tmp_path, data, "--validation", data, large="https://host.example/v1#org/model-7b"
    )
    assert isinstance(config.frozen, OpenAIFrozen)
    assert config.frozen.base_url == "https://host.example/v1"
    assert config.frozen.model == "org/model-7b"
    assert config.teacher is not None
    assert config.teacher.kind == "frozen"
    assert isinstance(config.data.validation, FileData)
    assert config.data.validation.part == "all"


def test_columns_are_kept(tmp_path: Path) -> None:
    record = {"gold": {"text": "Oster"}, "context": RECORD["context"]}
    config = made(tmp_path, written(tmp_path, record), "--column", "answer=gold.text")
    assert isinstance(config.data.train, FileData)
    assert config.data.train.columns.answer == "gold.text"
    assert load_examples(config.data.train).examples[0].answer == "Oster"


def test_a_long_context_leaves_room_in_the_window(tmp_path: Path) -> None:
    long = [["Velm", ["Velm is an old town of many houses. " * 400]]]
    config = made(tmp_path, written(tmp_path, RECORD | {"context": long}, count=3))
    assert 16 <= config.data.context.max_tokens <= 1024


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--large": "http://127.0.0.1:8000/v1"}, "is an address without a model"),
        ({"--data": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ({"--small": "nowhere/at-all"}, "nowhere/at-all"),
        ({"--column": "text=a"}, "--column names the field 'text'"),
        ({"--output": "there.yaml"}, "exists: name another file"),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, change: dict[str, str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("")
    given = {"--data": written(tmp_path, RECORD), "--small": "random:llama"}
    given |= {"--large": "random:llama"} | change
    assert main(["init", *(word for pair in given.items() for word in pair)]) == 2
    assert said in capsys.readouterr().err
    assert not Path("lmcot.yaml").exists()
