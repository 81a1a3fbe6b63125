"""`lmcot init`: settings for a file of questions, two models and this machine."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lmcot.cli import main
from lmcot.config import Config, RefineSettings, dump_config, load_config
from lmcot.config.data import Columns, FileData
from lmcot.config.frozen import OpenAIFrozen, TransformersFrozen
from lmcot.data import load_examples
from lmcot.errors import UserError
from lmcot.tools.init import default_run_dir, settings_of_run
from lmcot.tools.starting_settings import Wanted, held_out_share

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


def test_questions_without_passages_get_no_words_on_passages(tmp_path: Path) -> None:
    """Their facts are a solution, which the teacher's rationales are made of all the same."""
    record = {"answer": True, "facts": ["Velm lies in Oster.", "Oster is in the north."]}
    config = made(tmp_path, written(tmp_path, record), "--task", "boolean")
    assert config.teacher is not None
    assert config.teacher.kind == "supporting_facts"
    text = (tmp_path / "made.yaml").read_text()
    assert "Gold passages" not in text
    assert "context:" not in text


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


def wanted(data: str, **changes: Any) -> Wanted:
    given = Wanted(data, None, "random:llama", "http://host.example/v1#m", Columns())
    return dataclasses.replace(given, **changes)


def begun(run: Path) -> None:
    """As a run that has begun leaves its directory."""
    config = load_config(str(run / "settings.yaml"), [])
    (run / "config.yaml").write_text(dump_config(config))


def test_a_run_without_a_settings_file_keeps_the_one_that_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = written(tmp_path, RECORD), tmp_path / "runs" / "mine"
    file = settings_of_run(wanted(data), run)
    assert file == run / "settings.yaml"
    text = file.read_text()
    assert text in capsys.readouterr().err
    assert load_config(str(file), ["refine.steps=3"]).refine.steps == 3
    # What has not begun may be given other data; what has resumes with the settings that it has.
    settings_of_run(wanted(data, small="random:t5"), run)
    assert load_config(str(file), []).policy.source == "random:t5"
    settings_of_run(wanted(data), run)
    file.write_text(text.replace("steps: 100", "steps: 7"))
    begun(run)
    written(tmp_path, RECORD, count=400)
    assert load_config(str(settings_of_run(wanted(data), run)), []).refine.steps == 7


def test_what_a_run_keeps_holds_the_overrides(tmp_path: Path) -> None:
    data, run = written(tmp_path, RECORD), tmp_path / "run"
    plain = settings_of_run(wanted(data), tmp_path / "plain").read_text()
    changes = {"refine.steps": 3, "policy": "random:t5", "evaluate.rows": ["cot"]}
    text = settings_of_run(wanted(data), run, changes).read_text()
    config = load_config(str(run / "settings.yaml"))
    assert (config.refine.steps, config.policy.source) == (3, "random:t5")
    assert config.evaluate.rows == ("cot",)
    assert "# With overrides of refine.steps, policy, evaluate.rows.\n" in text
    untouched = [
        one for one in plain.splitlines() if one.startswith(("  backend:", "  # Held out"))
    ]
    assert len(untouched) == 2
    assert set(untouched) < set(text.splitlines()), "comments of other sections stay"
    begun(run)
    # The same command resumes, and so does one with other overrides; another model is refused.
    assert settings_of_run(wanted(data), run, changes).read_text() == text
    assert settings_of_run(wanted(data), run, changes | {"refine.steps": 5}).read_text() == text
    with pytest.raises(UserError, match="other values of --small "):
        settings_of_run(wanted(data), run, {"refine.steps": 3})
    with pytest.raises(UserError, match="other values of --large "):
        settings_of_run(wanted(data, large="http://host.example/v1#n"), run, changes)


def test_an_override_that_is_wrong_is_not_kept(tmp_path: Path) -> None:
    data, run = written(tmp_path, RECORD), tmp_path / "run"
    with pytest.raises(UserError, match=r"unknown key 'refine.step'"):
        settings_of_run(wanted(data), run, {"refine.step": 3})
    assert not run.exists()


@pytest.mark.parametrize(
    ("count", "share"), [(1, 0.25), (40, 0.25), (80, 0.25), (120, 0.167), (200, 0.1), (9000, 0.1)]
)
def test_of_few_questions_more_are_held_out(count: int, share: float) -> None:
    assert held_out_share(count) == share


def test_the_questions_that_are_held_out(tmp_path: Path) -> None:
    config = made(tmp_path, written(tmp_path, RECORD, count=100))
    assert "to evaluate on: about 20 of 100 questions (" in (tmp_path / "made.yaml").read_text()
    held_out = load_examples(config.data.validation).examples
    assert 12 <= len(held_out) <= 28, "the words of each question decide"
    assert len(held_out) + len(load_examples(config.data.train).examples) == 100


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"small": "random:qwen"}, "--small"),
        ({"large": "http://host.example/v1#n"}, "--large"),
        ({"large": "random:llama"}, "--large"),
        ({"columns": Columns(answer="gold")}, "--data and --validation"),
        ({"validation": "other.jsonl"}, "--validation"),
    ],
)
def test_a_run_is_not_resumed_with_other_data_or_models(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    data, run = written(tmp_path, RECORD), tmp_path / "run"
    settings_of_run(wanted(data), run)
    begun(run)
    with pytest.raises(UserError, match=f"other values of {named} "):
        settings_of_run(wanted(data, **changes), run)


def test_a_run_with_a_settings_file_of_ones_own_is_not_taken_over(tmp_path: Path) -> None:
    data, run = written(tmp_path, RECORD), tmp_path / "run"
    settings_of_run(wanted(data), run)
    begun(run)
    (run / "settings.yaml").unlink()
    with pytest.raises(UserError, match="resume it with --config"):
        settings_of_run(wanted(data), run)


@pytest.mark.parametrize(
    ("data", "run"),
    [("a/My questions.v2.jsonl.gz", "My-questions"), ("shards/*.jsonl", "run"), ("x/", "x")],
)
def test_a_run_is_named_after_its_data(data: str, run: str) -> None:
    assert default_run_dir(data) == Path("runs") / run


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --data a.jsonl", "train lacks --small and --large"),
        ("train", "train lacks --data and --small and --large"),
        ("train --config c.yaml --small b --run-dir r", "is given --config"),
        ("train --config c.yaml --column a=b --run-dir r", "is given --config"),
        ("train --config c.yaml", "train lacks --run-dir"),
    ],
)
def test_train_says_what_it_lacks(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert said in capsys.readouterr().err


def test_settings_fit_the_window_of_the_smaller_model(tmp_path: Path) -> None:
    config = made(tmp_path, written(tmp_path, RECORD))
    assert config.policy.dtype == "auto"
    assert config.actors.rollout.threads == os.cpu_count()
    assert config.refine.samples_per_prompt == RefineSettings().samples_per_prompt


def test_questions_of_another_task_need_no_context(tmp_path: Path) -> None:
    record = {"answer": True}
    data = written(tmp_path, record)
    config = made(tmp_path, data, "--task", "boolean")
    assert config.task.kind == "boolean"
    assert load_config(str(settings_of_run(wanted(data, task="boolean"), tmp_path / "run")), [])
    begun(tmp_path / "run")
    with pytest.raises(UserError, match="other values of --task "):
        settings_of_run(wanted(data), tmp_path / "run")


def test_a_task_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--small", "random:llama", "--large", "random:llama", "--task", "booleans"]
    assert main(["init", "--data", written(tmp_path, RECORD), *given]) == 2
    assert "there is no task 'booleans'" in capsys.readouterr().err
