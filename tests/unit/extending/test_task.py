"""The task of docs/extending.md, as it stands there: read from a file, judged and voted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lmcot.config import FileData
from lmcot.config.task import CustomTask
from lmcot.data.loaders import load_examples
from lmcot.data.tasks import Scores, Task, open_task
from lmcot.errors import UserError
from lmcot.records import Completion
from lmcot.text.vote import vote
from tests.support.worked import python_blocks


@pytest.fixture
def task() -> Iterator[Task]:
    """The page's task, opened by its name as the settings give it."""
    [code] = python_blocks("A task")
    module = ModuleType("my_tasks")
    exec(code, module.__dict__)
    sys.modules["my_tasks"] = module
    yield open_task(CustomTask(kind="custom", name="my_tasks:Names"))
    del sys.modules["my_tasks"]


def test_the_page_s_task_reads_and_compares(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    record = {"id": "q", "question": "Who wrote it?", "names": ["Ilse Marrant", "Anton Rell"]}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    source = FileData(kind="file", path=str(path))
    (example,) = load_examples(source, task=task, require_context=False).examples
    assert example.answer == "Ilse Marrant, Anton Rell"
    reply = Completion("So the answer is Anton Rell and Ilse Marrant.", 1, 9, "stop")
    said = task.answer(reply, example.question).extracted
    assert task.scores(said, example) == Scores(1.0, 1.0, 1.0)
    assert task.scores("Anton Rell", example).f1 == pytest.approx(2 / 3)
    assert vote(["Rell, Ott", "Marrant", "Ott and Rell"], key=task.key).share == pytest.approx(
        2 / 3
    )
    path.write_text('{"question": "Who?", "names": "Ott"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="must be a list of names"):
        load_examples(source, task=task, require_context=False)
