"""What was derived from a file is bound to the file's content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmcot.config import parse_config
from lmcot.errors import UserError
from lmcot.evaluation.predictions import Kept
from lmcot.monitor.metrics import Monitor
from lmcot.records import Annotation
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory, read_annotations
from lmcot.run.inputs import check_contents, contents
from lmcot.run.interruption import Interruption
from lmcot.training.annotate import annotate
from lmcot.training.distill import _pairs, distill

Opened = Callable[..., Run]


@dataclass(frozen=True)
class _Line:
    id: str


def question(number: int, answer: str = "Velm", sentence: str = "It is in Velm.") -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "question": f"Where is place {number}?",
        "answer": answer,
        "context": [{"title": f"Place {number}", "sentences": [sentence, "It is old."]}],
        "supporting_facts": [{"title": f"Place {number}", "sent_id": 0}],
    }


def write(path: Path, *questions: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")


@pytest.fixture
def opened(tmp_path: Path, model_cache: Path) -> Iterator[Opened]:
    """Opens the run again, with some of its settings changed."""
    write(tmp_path / "train.jsonl", *map(question, range(3)))
    write(tmp_path / "validation.jsonl", question(9))

    with ExitStack() as stack:

        def open_again(**changes: Any) -> Run:
            stack.close()
            files = {
                part: {"kind": "file", "path": str(tmp_path / f"{part}.jsonl")}
                for part in ("train", "validation")
            }
            config = parse_config(
                {
                    "data": files,
                    "policy": {"source": "random:llama", "max_new_tokens": 200},
                    "frozen": {"backend": "transformers", "source": "random:llama"},
                    "teacher": {"kind": "supporting_facts"},
                    **changes,
                }
            )
            directory = stack.enter_context(RunDirectory(tmp_path / "run"))
            monitor = stack.enter_context(Monitor(directory.path))
            return Run(config, directory, monitor, Interruption())

        yield open_again


def by_id(annotations: list[Annotation]) -> dict[str, Annotation]:
    return {one.example_id: one for one in annotations}


def test_what_changed_in_the_data_is_annotated_again(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = by_id(annotate(opened()))
    assert list(first) == ["q0", "q1", "q2"]
    assert annotate(opened()) == list(first.values())
    assert "annotate: done already" in capsys.readouterr().err
    # One answer is corrected, one sentence too, one question goes, two come.
    write(
        tmp_path / "train.jsonl",
        question(0, answer="Parrow"), question(1, sentence="It is in old Velm."), question(3),
        question(4),
    )  # fmt: skip
    run = opened()
    second = by_id(annotate(run))
    assert "2 rationales are made again" in (told := capsys.readouterr().err)
    assert "2 questions are new, 1 are gone" in told
    assert {key: one.rationale for key, one in second.items()} == {
        "q0": "It is in Velm. So the answer is Parrow.",
        "q1": "It is in old Velm. So the answer is Velm.",
        "q3": "It is in Velm. So the answer is Velm.",
        "q4": "It is in Velm. So the answer is Velm.",
    }
    assert by_id(read_annotations(run.directory.rationales)) == second
    assert len(_pairs(run, list(second.values()))) == 4


def test_nothing_kept_is_refused_each_time_and_other_settings_help(opened: Opened) -> None:
    short = {"source": "random:llama", "max_new_tokens": 4}
    for stage in (annotate, annotate, distill):
        with pytest.raises(UserError) as caught:
            stage(opened(policy=short))
        assert str(caught.value).startswith(
            "no rationale was kept of 3; 3 rejected: longer than policy.max_new_tokens: change the "
        )
    assert opened().directory.finished("distill") is None
    assert all(one.kept for one in annotate(opened()))


def test_rationales_that_belong_to_no_question_are_not_distilled(
    opened: Opened, tmp_path: Path
) -> None:
    run = opened()
    annotate(run)
    run.directory.finish("distill", steps=1)
    write(tmp_path / "train.jsonl", question(7))
    run = opened()
    assert _pairs(run, annotate(run)) == [], "they were learned before, and stay"
    (run.directory.path / "stages.json").unlink()
    checkpoint = run.directory.checkpoints / "distill-step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("{}")
    with pytest.raises(UserError, match="there is nothing to distil: no rationale that was kept"):
        distill(run)


def test_a_line_of_an_earlier_version_is_taken_as_it_is(opened: Opened) -> None:
    run = opened()
    lines = [json.loads(line) for line in _lines(run, annotate)]
    for line in lines:
        del line["made_from"]
        line["rationale"] = "By hand. So the answer is Velm."
    run.directory.rationales.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {one.rationale for one in annotate(opened())} == {"By hand. So the answer is Velm."}


def _lines(run: Run, stage: Callable[[Run], Any]) -> list[str]:
    stage(run)
    return run.directory.rationales.read_text(encoding="utf-8").splitlines()


def test_a_stage_that_has_begun_refuses_other_contents(opened: Opened, tmp_path: Path) -> None:
    run = opened()
    for stage in ("distill", "refine"):
        run.directory.begin(stage, contents(run, stage))
    write(tmp_path / "train.jsonl", *map(question, range(4)))
    check_contents(opened())  # none of them has come to a step
    run = opened()
    run.directory.finish("distill", steps=1)
    with pytest.raises(UserError) as caught:
        check_contents(run)
    told = str(caught.value)
    assert told.startswith("data.train holds something else than when the stage 'distill' of the ")
    assert "(3 questions with digest " in told
    assert " then, 4 questions with digest " in told
    write(tmp_path / "train.jsonl", *map(question, range(3)))
    check_contents(opened())
    write(tmp_path / "validation.jsonl", question(8))
    check_contents(opened())


def test_edited_templates_are_other_contents(opened: Opened, tmp_path: Path) -> None:
    shipped = Path("lmcot/data/templates/default.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped, encoding="utf-8")
    prompts = {"templates": str(mine)}
    run = opened(prompts=prompts)
    run.directory.begin("refine", contents(run, "refine"))
    run.directory.finish("refine", steps=1)
    mine.write_text(shipped + "# a remark\n", encoding="utf-8")
    check_contents(opened(prompts=prompts))
    mine.write_text(shipped.replace("Quote the facts", "Name the facts"), encoding="utf-8")
    with pytest.raises(UserError, match=r"^prompts.templates holds something else"):
        check_contents(opened(prompts=prompts))


def test_predictions_are_bound_to_their_questions(tmp_path: Path) -> None:
    path = tmp_path / "cot.jsonl"
    Kept(path, "mark", {"a": "1", "b": "1", "c": "1"}).add([_Line("a"), _Line("b"), _Line("c")])
    again = Kept(path, "mark", {"a": "1", "b": "2", "d": "1"})
    assert (list(again.records), again.dropped) == (["a"], 1)
    again.add([_Line("d")])
    assert list(Kept(path, "mark", {"a": "1", "d": "1"}).records) == ["a", "d"]
