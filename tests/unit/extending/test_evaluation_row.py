"""The evaluation row of docs/extending.md, as it stands there: in a whole evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmcot.actors.units import PromptUnit
from lmcot.config import load_config, rows
from lmcot.evaluation import work
from lmcot.evaluation.evaluate import evaluate
from lmcot.frozen.cached import Replies
from lmcot.monitor.metrics import Monitor
from lmcot.records import Completion, Example, Usage
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from tests.support.worked import python_blocks

CONFIG = Path(__file__).parents[3] / "configs" / "smoke_t5.yaml"


class Frozen:
    """A fleet and its client; the frozen LM knows the answer if it reads the question twice."""

    handles: Sequence[Any] = ()

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def wait_ready(self) -> None:
        """It is."""

    def map(
        self, units: Sequence[PromptUnit], *, on_result: Callable[[int, Replies], None]
    ) -> None:
        """Answers the units, the last one first."""
        for index, unit in reversed(list(enumerate(units))):
            replies = [self._reply(prompt[-1].content) for prompt in unit.prompts]
            on_result(index, Replies(replies, Usage(asked=len(replies), sent=len(replies))))

    def _reply(self, prompt: str) -> Completion:
        asked = next(one for one in self._examples if one.question in prompt)
        knows = prompt.count(asked.question) == 2
        return Completion(asked.answer if knows else "Atlantis", len(prompt), 2, "stop")


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of rows with the page's row in it."""
    [code] = python_blocks("An evaluation row")
    namespace = dict(vars(rows))
    exec(code, namespace)
    for name, row in rows.with_votes(namespace["_TABLE"]).items():
        monkeypatch.setitem(rows.ROWS, name, row)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extended: None) -> Iterator[Run]:
    """A run that evaluates the row, as a user asks for it."""
    config = load_config(CONFIG, ["evaluate.rows=[control_question, standard]"])

    @contextmanager
    def frozen_fleet(opened: Run) -> Iterator[Frozen]:
        yield Frozen([question.example for question in opened.validation])

    monkeypatch.setattr(Run, "frozen_fleet", frozen_fleet)
    monkeypatch.setattr(Run, "frozen_client", lambda opened, fleet: fleet)
    monkeypatch.setattr(work, "check_plan", lambda *stage: None)  # there is no cluster
    with RunDirectory(tmp_path) as directory, Monitor(tmp_path) as monitor:
        yield Run(config, directory, monitor, Interruption())


def test_the_row_of_the_page_is_evaluated_and_reported(run: Run) -> None:
    evaluate(run)
    folder = run.directory.path
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert {name: row["em"] for name, row in report["rows"].items()} == {
        "standard": 0.0,
        "control_question": 100.0,
    }
    assert [(one["first"], one["second"]) for one in report["tests"]] == [
        ("control_question", "standard")
    ]
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| `control_question` | control: the question in place of a rationale | 100.0" in text
    assert {one.name for one in folder.glob("*.png")} == {"report.png", "report-cost.png"}
    lines = (folder / "predictions" / "control_question.jsonl").read_text(encoding="utf-8")
    for line in lines.splitlines():
        one = json.loads(line)
        assert one["rationale"] == one["question"]
        assert one["contains_gold"] is None, "it is not a rationale of the small LM"


def test_predictions_that_are_there_are_not_asked_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(run)
    before = (run.directory.path / "report.json").read_bytes()
    monkeypatch.setattr(Frozen, "map", None)
    evaluate(run)
    assert (run.directory.path / "report.json").read_bytes() == before


def test_without_the_page_there_is_no_such_row() -> None:
    assert "control_question" not in rows.ROWS
