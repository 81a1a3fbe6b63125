"""Each task through every stage on tiny random models: a file in its data set's own layout is
annotated, distilled, refined on, evaluated, and answered in a program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmcot import Guide
from lmcot.data.tasks import Scores, Task
from lmcot.records import Example
from tests.integration.command import lmcot

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("cluster")]

ROWS = ["standard", "guided_refined", "small_alone", "control_masked"]
FACTS: dict[str, Any] = {"kind": "supporting_facts"}
MONTHS = ("January", "March", "May", "July", "August", "October")


class Months(Task):
    """Answers are months, of which the first three letters count."""

    def scores(self, answer: str, example: Example) -> Scores:
        return Scores.right(answer[:3].lower() == example.answer[:3].lower())


@dataclass(frozen=True)
class Case:
    """A task with questions in the layout of its data set."""

    task: Any
    records: Sequence[Mapping[str, Any]]
    answer: str
    """The right answer of the first question, as the run reads it."""
    as_lines: bool = True
    rationales: Sequence[str] = ()
    """The teacher's, where the data has no solution."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True
    """Whether a small LM is distilled and refined on it: where that has ways of its own."""


def strategyqa() -> Case:
    records = [
        {
            "qid": f"s{n}", "term": "snail", "description": "a slow animal",
            "question": f"Could a snail cross a room of {n} metres in a day?", "answer": n < 4,
            "facts": [f"A snail moves about {n + 1} metres in a day.", f"The room has {n} metres."],
            "decomposition": [], "evidence": [],
        }
        for n in range(1, 7)
    ]  # fmt: skip
    return Case("boolean", records, "yes", as_lines=False, trained=False)


def gsm8k() -> Case:
    records = [
        {
            "question": f"Ina has {n} boxes with 6 pencils each. How many pencils has she?",
            "answer": f"She has {n}*6 = <<{n}*6={6 * n}>>{6 * n} pencils.\n#### {6 * n}",
        }
        for n in range(1, 7)
    ]
    prompts = {"demonstrations": 1, "guidance": "advice", "first_answer": "cot"}
    # A random T5 writes no text that could be advised on.
    frozen = {"backend": "transformers", "source": "random:llama", "dtype": "float32",
              "max_answer_tokens": 4}  # fmt: skip
    return Case("numeric", records, "6", settings={"prompts": prompts, "frozen": frozen})


def arc() -> Case:
    rocks = ["granite", "pumice", "marble", "slate"]
    records = [
        {
            "id": f"Mercury_{n}", "question": f"Which rock floats on lake number {n}?",
            "choices": {"text": rocks, "label": list("ABCD")}, "answerKey": "B",
        }
        for n in range(1, 7)
    ]  # fmt: skip
    rationales = [
        f"Pumice is full of holes that hold air, on lake {n} as well. So the answer is B."
        for n in range(1, 7)
    ]
    return Case(
        {"kind": "multiple_choice"}, records, "B", rationales=rationales,
        settings={"rewards": {"choice_probability_weight": 0.5}},
    )  # fmt: skip


def free_text() -> Case:
    records = [
        {"id": f"f{n}", "question": f"Why does bread rise on day {n}?",
         "answers": ["Yeast makes gas in the dough.", "Because of the gas of the yeast."]}
        for n in range(1, 7)
    ]  # fmt: skip
    rationales = [
        f"On day {n} yeast eats sugar. So the answer is: Yeast makes gas in the dough."
        for n in range(1, 7)
    ]
    return Case(
        "free_text", records, "Yeast makes gas in the dough.", rationales=rationales, trained=False
    )


def months() -> Case:
    records = [
        {"id": f"m{n}", "question": f"Which month has festival {n}?", "answer": month}
        for n, month in enumerate(MONTHS)
    ]
    rationales = [
        f"The festival begins in the summer or winter of the year. So the answer is {month[:3]}."
        for month in MONTHS
    ]
    task = {"kind": "custom", "name": f"{__name__}:Months"}
    settings = {"prompts": {"templates": "closed_book", "demonstrations": 1}}
    return Case(task, records, "January", rationales=rationales, settings=settings)


CASES = {one.__name__: one for one in (strategyqa, gsm8k, arc, free_text, months)}


def settings_of(case: Case, folder: Path) -> Path:
    """The run's settings, beside its data."""
    text = "\n".join(map(json.dumps, case.records)) if case.as_lines else json.dumps(case.records)
    data = folder / "questions.json"
    data.write_text(text, encoding="utf-8")
    teacher = FACTS
    if case.rationales:
        path = folder / "rationales.jsonl"
        ids = [one["id"] for one in case.records]
        lines = [
            json.dumps({"id": key, "rationale": text})
            for key, text in zip(ids, case.rationales, strict=True)
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
        teacher = {"kind": "file", "path": str(path), "unknown_ids": "ignore"}
    source = {"kind": "file", "path": str(data), "held_out": 0.4}
    small = {"source": "random:t5", "dtype": "float32"}
    tiny = {"cpus": 0.25, "threads": 1}
    settings = {
        "data": {"train": {**source, "part": "train"},
                 "validation": {**source, "part": "validation"}},
        "task": case.task,
        "prompts": {"demonstrations": 1},
        "policy": {**small, "max_new_tokens": 120},
        "frozen": {"backend": "transformers", **small, "max_answer_tokens": 4},
        "teacher": {**teacher, "filters": {"min_words": 0, "repeats_question": False,
                                           "near_duplicates": None}},
        "distill": {"batch_size": 2},
        "refine": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
        "learner": {"zero_stage": 0},
        "evaluate": {"rows": ROWS},
        "actors": {"prompts_per_unit": 4, "rollout": {**tiny, "count": 1},
                   "reward": {"count": 1, "cpus": 0.25}, "frozen": {"count": 1, **tiny},
                   "learner": tiny},
        **case.settings,
    }  # fmt: skip
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_advice(run_dir: Path, judged: Sequence[Mapping[str, Any]]) -> None:
    """Each question was answered first once, and all that rests on that answer bears its cost."""
    first = {one["id"]: one for one in lines(run_dir / "first_answers.jsonl")}
    assert len(first) == len(lines(run_dir / "first_answers.jsonl")) == 6
    assert all(one.get("first_answer", "") == first[one["example_id"]]["text"] for one in judged)
    assert any(one["text"] for one in first.values())
    asked = {"standard": 1, "guided_refined": 2, "small_alone": 1, "control_masked": 2}
    for row, requests in asked.items():
        for one in lines(run_dir / "predictions" / f"{row}.jsonl"):
            assert one["requests"] == requests
            rests = row != "standard"
            assert one["first_answer"] == (first[one["id"]]["text"] if rests else "")
            if row == "small_alone":
                assert one["large_lm_tokens_out"] == first[one["id"]]["tokens_out"]
    spent = json.loads((run_dir / "spending.json").read_text(encoding="utf-8"))
    assert spent["first_answers"]["asked"] == 6
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    assert any(note.startswith("Guidance is advice") for note in report["notes"])


@pytest.mark.parametrize("name", list(CASES))
def test_every_stage(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    run_dir = tmp_path / "run"
    config = settings_of(case, tmp_path)
    rows = ROWS if case.trained else ["standard", "guided_base"]
    for stage in ("train",) if case.trained else ("annotate", "evaluate"):
        done = lmcot(
            stage, "--config", str(config), "--run-dir", str(run_dir),
            f"evaluate.rows=[{', '.join(rows)}]",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "no question has passages" in done.stderr
    kept = lines(run_dir / "rationales.jsonl")
    assert kept
    assert all(one["kept"] for one in kept), kept
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    assert list(report["rows"]) == rows
    assert any("passages" in note for note in report["notes"])
    assert all("factuality" not in scores for scores in report["aspects"].values())
    predictions = lines(run_dir / "predictions" / f"{rows[1]}.jsonl")
    assert predictions
    assert {one["copied"] for one in predictions} == {None}
    judged = check_refined(run_dir, name) if case.trained else []
    with Guide(run_dir, policy=None if case.trained else "base") as guide:
        answered = guide.answer(str(case.records[0]["question"]))
    assert answered.tokens.small_lm_out > 0
    assert answered.tokens.large_lm_out > 0
    if name == "gsm8k":
        check_advice(run_dir, judged)
        assert answered.first_answer is not None
    else:
        assert answered.first_answer is None
        assert not (run_dir / "first_answers.jsonl").exists()
    if name == "strategyqa":
        assert answered.answer in ("yes", "no", "")


def check_refined(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The judged rationales of its only step, which have the components of the task."""
    judged = lines(run_dir / "rollouts" / "step-000001.jsonl")
    assert judged
    assert all({"em", "f1"} <= set(one["judgement"]["components"]) for one in judged)
    assert not any("aspect/factuality" in one["judgement"]["components"] for one in judged)
    weighed = "choice_probability" in judged[0]["judgement"]["components"]
    assert weighed == (name == "arc")
    return judged
