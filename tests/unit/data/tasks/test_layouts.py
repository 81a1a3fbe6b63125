"""Each task reads the layouts in which its data sets are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from lmcot.config import FileData
from lmcot.config.data import Columns
from lmcot.config.task import TaskChoice
from lmcot.data.loaders import load_examples
from lmcot.data.tasks import open_task
from lmcot.errors import UserError
from lmcot.records import Example

ROCKS = "Which rock floats?\n(A) granite\n(B) pumice\n(C) marble"


def read(
    folder: Path,
    records: list[dict[str, Any]],
    task: object,
    *,
    lines: bool = True,
    columns: dict[str, str] | None = None,
) -> list[Example]:
    path = folder / "questions.json"
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    settings = TypeAdapter(TaskChoice).validate_python(task)
    source = FileData(kind="file", path=str(path), columns=Columns(**columns or {}))
    return load_examples(source, task=open_task(settings), require_context=False).examples


def test_options_of_any_field(tmp_path: Path) -> None:
    rocks = ["granite", "pumice", "marble"]
    own: dict[str, Any] = {
        "stem": "Which rock floats?", "answers": {"all": rocks}, "options": ["no", "yes"],
        "gold": 1,
    }  # fmt: skip
    named = {"question": "stem", "answer": "gold"}
    (found,) = read(tmp_path, [own], "multiple_choice", columns=named | {"choices": "answers.all"})
    assert (found.question, found.answer) == (ROCKS, "B")
    (found,) = read(tmp_path, [own], "multiple_choice", columns=named)
    assert found.question.endswith("(A) no\n(B) yes"), "columns replace what would be read"


def test_options_of_a_field_each(tmp_path: Path) -> None:
    """As MedMCQA and tables have them."""
    record = {"question": "Which rock floats?", "opa": "granite", "opb": "pumice", "opc": "marble",
              "opd": "", "cop": 1}  # fmt: skip
    columns = {"choices": "opa, opb,opc,opd", "answer": "cop"}
    (found,) = read(tmp_path, [record], "multiple_choice", columns=columns)
    assert (found.question, found.answer) == (ROCKS, "B")
    for lost in (record | {"opb": ""}, {"question": "Which?", "cop": 1}):
        with pytest.raises(UserError, match=r"columns\.choices names"):
            read(tmp_path, [lost], "multiple_choice", columns=columns)


def test_strategyqa(tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "qid": "b8677742616fef051f00",
        "term": "Genghis Khan",
        "description": "founder and first Great Khan of the Mongol Empire",
        "question": "Are more people today related to Genghis Khan than Julius Caesar?",
        "answer": True,
        "facts": ["Julius Caesar had three children.", "Genghis Khan had sixteen children."],
        "decomposition": ["How many kids did Julius Caesar have?", "Is #2 greater than #1?"],
        "evidence": [[[["Caesar-75"], "operation"]]],
    }
    (one,) = read(tmp_path, [record], "boolean", lines=False)
    assert (one.id, one.answers, one.context) == (record["qid"], ("yes",), ())
    assert one.gold_sentences() == tuple(record["facts"])


def test_boolq(tmp_path: Path) -> None:
    record = {
        "question": "does ethanol take more energy make that produces",
        "title": "Ethanol fuel",
        "answer": False,
        "passage": "All biomass goes through some of these steps. It needs to be grown.",
    }
    (one,) = read(tmp_path, [record], "boolean")
    assert one.answers == ("no",)
    assert one.context[0].title == "Ethanol fuel"
    assert len(one.context[0].sentences) == 2


def test_gsm8k(tmp_path: Path) -> None:
    record = {
        "question": "Natalia sold 48 clips in April and half as many in May. How many in all?",
        "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "She sold 48+24 = <<48+24=72>>72 clips in all.\n#### 1,072",
    }
    (one,) = read(tmp_path, [record], "numeric")
    assert one.answers == ("1072",)
    assert one.gold_sentences() == (
        "She sold 48/2 = 24 clips in May.",
        "She sold 48+24 = 72 clips in all.",
    )


@pytest.mark.parametrize(
    "record",
    [
        # ARC on the hub, ARC as AI2 publishes it, CommonsenseQA, labels of digits.
        {
            "id": "Mercury_1", "question": "Which rock floats?", "answerKey": "B",
            "choices": {"text": ["granite", "pumice", "marble"], "label": ["A", "B", "C"]},
        },
        {
            "id": "Mercury_1", "answerKey": "B",
            "question": {
                "stem": "Which rock floats?",
                "choices": [
                    {"text": "granite", "label": "A"}, {"text": "pumice", "label": "B"},
                    {"text": "marble", "label": "C"},
                ],
            },
        },
        {
            "id": "1afa", "answerKey": "B",
            "question": {
                "question_concept": "rock", "stem": "Which rock floats?",
                "choices": [
                    {"label": "A", "text": "granite"}, {"label": "B", "text": "pumice"},
                    {"label": "C", "text": "marble"},
                ],
            },
        },
        {
            "id": "Mercury_2", "question": "Which rock floats?", "answerKey": "2",
            "choices": {"text": ["granite", "pumice", "marble"], "label": ["1", "2", "3"]},
        },
        # MMLU's index, a text as the answer, a letter, options in the question itself.
        {"question": "Which rock floats?", "choices": ["granite", "pumice", "marble"], "answer": 1},
        {"question": "Which rock floats?", "options": ["granite", "pumice", "marble"],
         "answer": "pumice"},
        {"question": "Which rock floats?", "options": {"A": "granite", "B": "pumice",
                                                       "C": "marble"}, "answer": "B"},
        {"question": ROCKS, "answer": "B"},
    ],
)  # fmt: skip
def test_multiple_choice(tmp_path: Path, record: dict[str, Any]) -> None:
    (one,) = read(tmp_path, [record], "multiple_choice")
    assert one.question == ROCKS
    assert one.answers == ("B", "pumice")
    (other,) = read(tmp_path, [record], {"kind": "multiple_choice", "answers": "texts"})
    assert other.answers == ("pumice", "B")


@pytest.mark.parametrize(
    ("task", "record", "problem"),
    [
        ("boolean", {"question": "Is it?", "answer": "perhaps"}, "neither yes nor no"),
        ("numeric", {"question": "How many?", "answer": "several"}, "'several' holds no number"),
        ("multiple_choice", {"question": "Which?", "answer": "B"}, "there are no options"),
        (
            "multiple_choice",
            {"question": "Which?", "choices": ["a cat", "a dog"], "answerKey": "E"},
            "'E' is none of the 2 options",
        ),
        (
            "multiple_choice",
            {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answer": "A"},
            "1 labels, but 2 options",
        ),
        ("multiple_choice", {"question": "Which?", "choices": ["a", "b"]}, "'answer' is missing"),
    ],
)
def test_what_is_no_question_of_the_task_is_refused(
    tmp_path: Path, task: str, record: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        read(tmp_path, [record], task)


def test_passages_are_asked_for_unless_the_settings_say_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "Who?", "answer": "Ott"}\n', encoding="utf-8")
    source = FileData(kind="file", path=str(path))
    with pytest.raises(UserError, match="require_context to false"):
        load_examples(source)
    (one,) = load_examples(source, require_context=False).examples
    assert one.context == ()
