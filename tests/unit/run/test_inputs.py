"""What was derived from a file is bound to the file's content."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmcot.actors.units import PromptUnit
from lmcot.config import parse_config
from lmcot.errors import Interrupted, UserError
from lmcot.evaluation.store import Kept
from lmcot.frozen.cached import Replies
from lmcot.monitor.metrics import Monitor
from lmcot.records import Annotation, Completion, Failure, FailureKind, Prompt, Usage
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory, read_annotations
from lmcot.run.inputs import check_contents, contents
from lmcot.run.interruption import Interruption
from lmcot.training.annotate import annotate
from lmcot.training.distill import STAGE, distill, kept_rationales
from lmcot.training.pairs import training_pairs

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
    assert "annotate: 3 of 3 rationales kept" in capsys.readouterr().err
    assert annotate(opened()) == list(first.values())
    assert capsys.readouterr().err == "annotate: done already\n", "the table is shown once"
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
    assert len(training_pairs(run, STAGE, kept_rationales(second.values()))) == 4


class _Teacher:
    """Takes the frozen LM's actors' place: fails for the questions that it is told to."""

    def __init__(self) -> None:
        self.fails: set[int] = set()
        self.dies_after = 99
        self.asked: list[int] = []

    def fleet(self) -> _Teacher:
        return self

    def __enter__(self) -> _Teacher:
        return self

    def __exit__(self, *ending: object) -> None:
        pass

    def wait_ready(self) -> None:
        pass

    def map(self, units: list[PromptUnit], on_result: Any) -> list[Replies]:
        done = []
        for index, unit in enumerate(units):
            if index >= self.dies_after:
                raise Interrupted
            found = Replies([self._reply(prompt) for prompt in unit.prompts], Usage())
            on_result(index, found)
            done.append(found)
        return done

    def _reply(self, prompt: Prompt) -> Completion | Failure:
        number = int(re.findall(r"Where is place (\d)", prompt[-1].content)[-1])
        self.asked.append(number)
        if number in self.fails:
            return Failure(FailureKind.TRANSIENT, "the endpoint is down")
        return Completion(f"Place {number} is in Velm. So the answer is Velm.", 1, 1, "stop")


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> _Teacher:
    found = _Teacher()
    monkeypatch.setattr(Run, "frozen_fleet", lambda run: found)
    monkeypatch.setattr(Run, "frozen_client", lambda run, fleet: fleet)
    monkeypatch.setattr("lmcot.training.teachers.frozen.check_plan", lambda *about: None)
    return found


ASKED: dict[str, Any] = {
    "teacher": {"kind": "frozen"},
    "actors": {"prompts_per_unit": 1},
    "failures": {"max_infrastructure_share": 0.9},
}


def _kept(annotations: list[Annotation]) -> dict[str, bool]:
    return {one.example_id: one.kept for one in annotations}


def test_what_failed_is_asked_again_on_request(
    opened: Opened, teacher: _Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.fails = {0, 2}
    assert _kept(annotate(opened(**ASKED))) == {"q0": False, "q1": True, "q2": False}
    told = capsys.readouterr().err
    assert "2 questions have no reply of the teacher; before distillation begins, 'lmcot" in told
    teacher.asked.clear()
    teacher.fails = {2}
    annotate(opened(**ASKED))
    assert teacher.asked == [], "not by itself: other stages begin with an annotation"
    again = annotate(opened(**ASKED), retry_failed=True)
    assert _kept(again) == {"q0": True, "q1": True, "q2": False}
    assert teacher.asked == [0, 2]
    run = opened(**ASKED)
    assert read_annotations(run.directory.rationales) == again
    assert not run.directory.rationales_begun.exists()
    run.directory.finish("distill", steps=1)
    with pytest.raises(UserError, match="distillation has begun with the rationales"):
        annotate(run, retry_failed=True)
    assert annotate(run) == again


def test_an_interrupted_retry_loses_nothing(opened: Opened, teacher: _Teacher) -> None:
    teacher.fails = {0, 2}
    annotate(opened(**ASKED))
    teacher.fails, teacher.dies_after = set(), 1
    with pytest.raises(Interrupted):
        annotate(opened(**ASKED), retry_failed=True)
    teacher.asked.clear()
    assert _kept(annotate(opened(**ASKED))) == {"q0": True, "q1": True, "q2": False}
    assert teacher.asked == []
    assert all(_kept(annotate(opened(**ASKED), retry_failed=True)).values())
    assert teacher.asked == [2]
    annotate(opened(**ASKED), retry_failed=True)
    assert teacher.asked == [2], "nothing is left that failed"


def test_failures_count_among_all_questions(opened: Opened, teacher: _Teacher) -> None:
    """A third of all, though all of those that were asked again."""
    teacher.fails = {2}
    budget = ASKED | {"failures": {"max_infrastructure_share": 0.4}}
    for retry in (False, True):
        assert _kept(annotate(opened(**budget), retry_failed=retry))["q2"] is False


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
    assert training_pairs(run, STAGE, kept_rationales(annotate(run))) == [], (
        "they were learned before, and stay"
    )
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
    assert told.startswith("data.train has changed since the stage 'distill' of the ")
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
    with pytest.raises(UserError, match=r"^prompts.templates has changed"):
        check_contents(opened(prompts=prompts))


def test_predictions_are_bound_to_their_questions(tmp_path: Path) -> None:
    path = tmp_path / "cot.jsonl"
    Kept(path, "mark", {"a": "1", "b": "1", "c": "1"}).add([_Line("a"), _Line("b"), _Line("c")])
    again = Kept(path, "mark", {"a": "1", "b": "2", "d": "1"})
    assert (list(again.records), again.dropped) == (["a"], 1)
    again.add([_Line("d")])
    assert list(Kept(path, "mark", {"a": "1", "d": "1"}).records) == ["a", "d"]
