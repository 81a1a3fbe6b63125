"""Which rationales are kept, and why others are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmcot.config import FrozenTeacher, SupportingFactsTeacher, load_config
from lmcot.monitor.metrics import Monitor
from lmcot.records import Annotation, Completion, Failure, FailureKind, to_json
from lmcot.run.context import Question, Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from lmcot.training.annotate import _read_partial, filters_of
from lmcot.training.teachers.facts import taken
from lmcot.training.teachers.frozen import judged as judge

FACTS = SupportingFactsTeacher(kind="supporting_facts")
CONFIG = Path(__file__).parents[3] / "configs" / "smoke_t5.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    config = load_config(CONFIG)
    with RunDirectory(tmp_path) as directory, Monitor(tmp_path) as monitor:
        yield Run(config, directory, monitor, Interruption())


def said(text: str) -> Completion:
    return Completion(text, tokens_in=10, tokens_out=5, finish_reason="stop")


def _from_facts(run: Run, question: Question) -> Annotation:
    return taken(question, FACTS, filters_of(run, FACTS), ())


def _judge(
    run: Run, teacher: FrozenTeacher, question: Question, result: Completion | Failure
) -> Annotation:
    return judge(question.example, result, teacher, filters_of(run, teacher))


def test_supporting_facts_become_a_rationale_that_concludes(run: Run) -> None:
    question = run.train[0]
    annotation = _from_facts(run, question)
    facts = " ".join(question.example.gold_sentences())
    assert facts
    assert annotation.rationale == f"{facts} So the answer is {question.example.answer}."
    assert annotation.kept == (annotation.reason == "supporting facts")


def test_facts_that_the_budget_cut_or_that_are_missing_are_rejected(run: Run) -> None:
    question = run.train[0]
    cut = _from_facts(run, Question(question.example, facts_cut=True))
    assert (cut.kept, cut.reason) == (
        False, "a supporting fact is outside the context's token budget",
    )  # fmt: skip
    bare = Question(replace(question.example, supporting_facts=()), facts_cut=False)
    assert _from_facts(run, bare).reason == "the question has no supporting facts"


def test_the_frozen_teacher_keeps_right_answers_only(run: Run) -> None:
    question = run.train[0]
    gold = question.example.answer
    teacher = FrozenTeacher(kind="frozen")

    def judged(result: Completion | Failure) -> tuple[bool, str, str]:
        annotation = _judge(run, teacher, question, result)
        return annotation.kept, annotation.reason, annotation.answer

    assert judged(said(f"It is a fact. So the answer is {gold}.")) == (True, "right answer", gold)
    assert judged(said("It is a fact. So the answer is Atlantis.")) == (
        False, "the teacher's answer is wrong", "Atlantis",
    )  # fmt: skip
    assert judged(said("I do not know")) == (False, "the teacher came to no answer", "")
    long = "word " * 400
    assert judged(said(f"{long} So the answer is {gold}."))[:2] == (
        False, "longer than policy.max_new_tokens",
    )  # fmt: skip
    paragraphs = f"It is a fact.\n\nAnother one.\n\nSo the answer is {gold}."
    assert judged(said(paragraphs)) == (True, "right answer", gold)
    assert _judge(run, teacher, question, said(paragraphs)).rationale == paragraphs
    cut = replace(said("A fact. And another"), finish_reason="length")
    assert "was cut before it came to its answer: raise frozen.max_rat" in judged(cut)[1]
    hidden = replace(said(""), finish_reason="length", thinking="Hm. So")
    assert "within its hidden thinking: raise frozen.max_thinking_tokens" in judged(hidden)[1]
    silent = replace(said(""), thinking="Hm.")
    assert "nothing but hidden thinking: raise frozen.max_thinking_tokens" in judged(silent)[1]
    failure = Failure(FailureKind.TRANSIENT, "the endpoint hangs")
    assert judged(failure) == (False, "failed: the endpoint hangs", "")


def test_a_partial_answer_is_enough_where_the_settings_say_so(run: Run) -> None:
    question = run.train[0]
    assert question.example.answer == "abstract strategy board game"
    half = said("It is a fact. So the answer is board game.")
    strict, lenient = FrozenTeacher(kind="frozen"), FrozenTeacher(kind="frozen", min_f1=0.6)
    assert not _judge(run, strict, question, half).kept
    assert _judge(run, lenient, question, half).kept, "F1 is 2/3"


def test_any_right_answer_is_right(run: Run) -> None:
    question = run.train[0]
    known = replace(question, example=replace(question.example, aliases=("Go", "Weiqi")))
    teacher = FrozenTeacher(kind="frozen")
    assert not _judge(run, teacher, question, said("It is a fact. So the answer is Weiqi.")).kept
    assert _judge(run, teacher, known, said("It is a fact. So the answer is Weiqi.")).kept


def test_a_line_cut_by_a_kill_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "rationales.partial.jsonl"
    whole = (
        '{"example_id": "a", "teacher": "frozen", "rationale": "r", "answer": "x", '
        '"kept": true, "reason": "right answer"}\n'
    )
    path.write_text(whole + whole[:20], encoding="utf-8")
    assert [a.example_id for a in _read_partial(path)] == ["a"]
    assert path.read_text(encoding="utf-8") == whole
    assert _read_partial(tmp_path / "none.jsonl") == []


def test_what_failed_is_asked_again_when_the_run_goes_on(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "rationales.partial.jsonl"
    question, other = run.train[:2]
    teacher = FrozenTeacher(kind="frozen")
    down = Failure(FailureKind.TRANSIENT, "the endpoint hangs")
    lost, wrong = _judge(run, teacher, question, down), _judge(run, teacher, other, said("No."))
    lines = [json.dumps(to_json(one)) + "\n" for one in (lost, wrong)]
    path.write_text("".join(lines), encoding="utf-8")
    assert [a.example_id for a in _read_partial(path)] == [other.example.id]
    # Both lines are in the file by then: the later one counts.
    found = _judge(
        run, teacher, question, said(f"It is a fact. So the answer is {question.example.answer}.")
    )
    path.write_text("".join([*lines, json.dumps(to_json(found)) + "\n"]), encoding="utf-8")
    assert [a.kept for a in _read_partial(path)] == [False, True]
