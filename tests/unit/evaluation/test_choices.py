"""Rows in which the frozen LM chooses among options, by their probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.actors.units import PromptUnit
from lmcot.config import parse_config
from lmcot.errors import UserError
from lmcot.evaluation import work
from lmcot.evaluation.evaluate import evaluate
from lmcot.frozen.cached import Replies
from lmcot.frozen.needs import Found
from lmcot.frozen.templates import open_templates
from lmcot.monitor.metrics import Monitor
from lmcot.records import Choice, Completion, Usage
from lmcot.rewards import first_check
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption


class Frozen:
    """Finds B likeliest, and writes A."""

    def __init__(self) -> None:
        self.options: list[tuple[str, ...]] = []

    def map(
        self, units: Sequence[PromptUnit], *, on_result: Callable[[int, Replies], None]
    ) -> None:
        for index, unit in enumerate(units):
            self.options.append(unit.options)
            replies: list[Any] = [Completion("A", 9, 1, "stop") for _ in unit.prompts]
            if unit.options:
                weights = {one: 0.6 if one == "B" else 0.1 for one in unit.options}
                replies = [Choice(weights, 9, 0) for _ in unit.prompts]
            on_result(index, Replies(replies, Usage(asked=len(replies), sent=len(replies))))


def settings(folder: Path, choices: str) -> dict[str, Any]:
    records = [
        {"id": f"q{n}", "question": f"Which rock floats on lake {n}?", "answer": "B",
         "choices": ["granite", "pumice", "marble", "slate"][: 3 + n % 2]}
        for n in range(4)
    ]  # fmt: skip
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return {
        "data": {"train": {"kind": "counting"}, "validation": str(folder / "q.jsonl")},
        "task": "multiple_choice",
        "policy": {"source": "random:llama"},
        "frozen": {"backend": "transformers", "source": "random:llama"},
        "refine": {"start_from": "base"},
        "evaluate": {"rows": ["standard", "cot", "control_empty"], "choices": choices},
    }


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Frozen:
    found = Frozen()
    fleet = SimpleNamespace(wait_ready=lambda: None, handles=())
    monkeypatch.setattr(Run, "frozen_fleet", lambda run: nullcontext(fleet))
    monkeypatch.setattr(Run, "frozen_client", lambda run, fleet: found)
    monkeypatch.setattr(Run, "train", [])
    monkeypatch.setattr(work, "check_plan", lambda *stage: None)
    return found


@pytest.fixture
def report(tmp_path: Path, model_cache: Path, frozen: Frozen) -> Callable[[str], Any]:
    def evaluated(choices: str) -> Any:
        config = parse_config(settings(tmp_path, choices))
        with RunDirectory(tmp_path / "run") as directory, Monitor(directory.path) as monitor:
            evaluate(Run(config, directory, monitor, Interruption()))
        return json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))

    return evaluated


def test_the_likeliest_option_is_the_answer(report: Callable[[str], Any], frozen: Frozen) -> None:
    by_reply = report("reply")
    assert {row["em"] for row in by_reply["rows"].values()} == {0.0}
    assert set(frozen.options) == {()}
    found = report("probability")
    assert {name: row["em"] for name, row in found["rows"].items()} == {
        "standard": 100.0, "cot": 0.0, "control_empty": 100.0,
    }  # fmt: skip
    assert set(frozen.options) == {(), tuple("ABC"), tuple("ABCD")}
    assert any("In standard, control_empty the answer is the option" in n for n in found["notes"])


def test_a_backend_without_probabilities_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(settings(tmp_path, "probability"))
    lacking = Found(config.frozen, lacks={"choose": "it gives no log-probabilities"})  # type: ignore[arg-type]
    monkeypatch.setattr(first_check, "check_frozen_lm", lambda *_: lacking)
    with pytest.raises(UserError, match=r"evaluate\.choices is 'probability', but the frozen LM"):
        first_check.check_frozen(config, open_templates(config.prompts))


def test_a_task_without_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no options: set it to 'reply'"):
        parse_config(settings(tmp_path, "probability") | {"task": "numeric"})
