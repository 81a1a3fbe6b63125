"""A task of plain functions: what they change, and what is said when they fail."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from lmcot.cli import main
from lmcot.config import FileData
from lmcot.config.task import TaskChoice
from lmcot.data.loaders import load_examples
from lmcot.data.tasks import Task, open_task
from lmcot.errors import UserError
from lmcot.records import Completion, Example

MONTH = Example("m", "Which month?", "July", (), aliases=("August",))


def same_month(answer: str, right_answers: tuple[str, ...]) -> bool:
    return answer[:3].lower() in {one[:3].lower() for one in right_answers}


def half(answer: str, right_answers: tuple[str, ...]) -> float:
    return 0.5


def last_word(text: str, question: str) -> str:
    return text.split()[-1].strip(".") if text.split() else ""


def months(record: Mapping[str, Any]) -> Mapping[str, Any]:
    if "month" not in record:
        raise ValueError("there is no 'month'")
    return {**record, "answer": record["month"]}


def fails(answer: str, right_answers: tuple[str, ...]) -> float:
    raise KeyError(answer)


def nothing(text: str, question: str) -> None:
    return None


def task(name: str, **more: str) -> Task:
    named = {key: f"{__name__}:{value}" for key, value in more.items()}
    values = {"kind": "custom", "name": f"{__name__}:{name}", **named}
    return open_task(TypeAdapter(TaskChoice).validate_python(values))


def test_a_function_compares_and_the_rest_is_as_in_extractive_qa() -> None:
    own = task("same_month")
    assert own.scores("jul", MONTH) == own.scores("AUG 3", MONTH)
    assert own.scores("jul", MONTH).em == 1.0
    assert own.scores("May", MONTH).f1 == own.scores("", MONTH).f1 == 0.0
    assert own.contains("It is hot. So the answer is Jul.", MONTH)
    assert own.stated("It is hot. So the answer is Jul.", "?") == "Jul"
    assert "compared by" in own.note


def test_a_value_between_is_f1_alone() -> None:
    found = task("half").scores("x", MONTH)
    assert (found.em, found.f1, found.inclusion) == (0.0, 0.5, 0.0)


def test_functions_read_answers_and_records(tmp_path: Path) -> None:
    own = task("same_month", read="last_word", fields="months")
    said = own.answer(Completion("I would say it is in July.", 9, 7, "stop"), "?")
    assert (said.extracted, said.missing) == ("July", "")
    assert own.answer(Completion("", 9, 0, "stop"), "?").missing == "empty"
    path = tmp_path / "q.jsonl"
    records = [{"id": "a", "question": "Which?", "month": "May"}, {"id": "b", "question": "Which?"}]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    source = FileData(kind="file", path=str(path))
    with pytest.raises(UserError, match=r"q\.jsonl:2: .*there is no 'month'"):
        load_examples(source, task=own, require_context=False)
    found = load_examples(source, on_bad="skip", task=own, require_context=False)
    assert [one.answer for one in found.examples] == ["May"]


def test_what_a_function_does_wrong_is_said() -> None:
    with pytest.raises(UserError, match=r"fails' raised KeyError"):
        task("fails").scores("x", MONTH)
    with pytest.raises(UserError, match="nothing' returned None, not a text"):
        task("half", read="nothing").read("x", "?")
    with pytest.raises(UserError, match=r"task\.read and task\.fields belong to a function"):
        task("MonthTask", read="last_word")
    with pytest.raises(UserError, match="has no function 'absent'"):
        task("half", read="absent")


class MonthTask(Task):
    """A class, as before."""


def test_a_class_is_still_a_task() -> None:
    assert isinstance(task("MonthTask"), MonthTask)


def test_the_data_command_reads_as_a_task_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "q.json"
    records = [{"qid": "s", "question": "Could a snail run?", "answer": False}]
    path.write_text(json.dumps(records), encoding="utf-8")
    assert main(["data", str(path)]) == 2
    assert "name another task (--task boolean: the answer is false;" in capsys.readouterr().err
    assert main(["data", str(path), "--task", "boolean"]) == 0
    assert "1 question" in capsys.readouterr().out
    assert main(["data", str(path), "--task", "bool"]) == 2
    assert "there is no task 'bool'" in capsys.readouterr().err
