"""Annotation as a whole: samples, hints, files, interruptions, with a stand-in for the actors."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from lmcot.errors import UserError
from lmcot.records import Annotation, Completion, Failure, FailureKind, Prompt, Sampling
from lmcot.run.directory import read_annotations
from lmcot.training.annotate import annotate
from lmcot.training.distill import STAGE, kept_rationales
from lmcot.training.pairs import training_pairs
from tests.support.stand_in_teacher import (
    StandInTeacher,
    opened_run,
    said,
    take_the_place_of_actors,
    write_lines,
)

HINT = "(The right answer is Velm.)"


def asked_place(prompt: Prompt) -> int:
    return int(re.findall(r"Where is place (\d+)", prompt[-1].content)[-1])


def right(number: int) -> str:
    return f"Place {number} is in Velm, says its own page. So the answer is Velm."


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch, model_cache: Path) -> StandInTeacher:
    found = StandInTeacher(lambda prompt, sampling: said(right(asked_place(prompt))))
    take_the_place_of_actors(found, monkeypatch.setattr)
    return found


def teacher(**settings: Any) -> dict[str, Any]:
    return {"teacher": {"kind": "frozen", **settings}}


def by_reason(annotations: list[Annotation]) -> Counter[str]:
    return Counter(one.reason for one in annotations)


def test_all_samples_are_written_down_and_the_best_is_kept(
    frozen: StandInTeacher, tmp_path: Path
) -> None:
    seeds: list[int | None] = []

    def says(prompt: Prompt, sampling: Sampling) -> Completion:
        number = asked_place(prompt)
        seeds.append(sampling.seed) if sampling.seed not in seeds else None
        texts = ("It is so, says Ott. So the answer is Velm.", right(number), "It is in Parrow.")
        return said(texts[seeds.index(sampling.seed)])

    frozen.says = says
    with opened_run(tmp_path, **teacher(samples=3, temperature=0.7)) as run:
        found = annotate(run)
        assert found == read_annotations(run.directory.rationales)
        assert len(training_pairs(run, STAGE, kept_rationales(found))) == 3
        table = (tmp_path / "run" / "rationales.md").read_text(encoding="utf-8")
    assert [(one.example_id, one.sample) for one in found] == [
        (f"q{number}", sample) for number in range(3) for sample in range(3)
    ]
    assert [one.sample for one in found if one.kept] == [1, 1, 1], "its passage supports it most"
    assert by_reason(found) == {
        "right answer": 3,
        "good, but another one of the question is better": 3,
        "the teacher came to no answer": 3,
    }
    assert "| questions with a rationale | 2 | 1 | 3 |" in table
    assert "| kept: right answer | 2 | 1 | 3 |" in table
    assert len(set(seeds)) == 3
    assert {len(unit.prompts) for unit in frozen.units} == {1, 2}


def test_seeds_come_from_the_runs_seed_alone(frozen: StandInTeacher, tmp_path: Path) -> None:
    found: list[list[Sampling]] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        frozen.units.clear()
        with opened_run(tmp_path / name, seed=seed, **teacher(samples=2, temperature=1.0)) as run:
            annotate(run)
        found.append([unit.sampling for unit in frozen.units])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_failed_questions_are_asked_again_with_the_answer_as_a_hint(
    frozen: StandInTeacher, tmp_path: Path
) -> None:
    def says(prompt: Prompt, sampling: Sampling) -> Completion | Failure:
        number = asked_place(prompt)
        if HINT in prompt[-1].content:
            leak = "As given, it is Velm. So the answer is Velm."
            return said(leak if number == 2 else right(number))
        if number == 3:
            return Failure(FailureKind.TRANSIENT, "the endpoint is down")
        return said(right(0) if number == 0 else "It is in Parrow. So the answer is Parrow.")

    frozen.says = says
    with opened_run(tmp_path, 4, **teacher(rationalise=True)) as run:
        found = annotate(run)
    assert [(one.example_id, one.hinted, one.kept, one.reason) for one in found] == [
        ("q0", False, True, "right answer"),
        ("q1", False, False, "the teacher's answer is wrong"),
        ("q1", True, True, "with the answer as a hint: right answer"),
        ("q2", False, False, "the teacher's answer is wrong"),
        ("q2", True, False, "with the answer as a hint: it tells that the answer was given"),
        ("q3", False, False, "failed: the endpoint is down"),
    ]
    frozen.units.clear()
    with opened_run(tmp_path, 4, **teacher(rationalise=True)) as run:
        assert annotate(run) == found
    assert frozen.units == []
    with opened_run(tmp_path, 4, **teacher(rationalise=True)) as run:
        again = annotate(run, retry_failed=True)
    asked = [(unit.unit_id, len(unit.prompts)) for unit in frozen.units]
    assert asked == [("annotate/0/3", 1)], "the endpoint is still down: no hint is tried"
    assert again == found


def test_without_demonstrations_the_teacher_sees_none(
    frozen: StandInTeacher, tmp_path: Path
) -> None:
    for name, shown, messages in (("a", True, 6), ("b", False, 2)):
        (tmp_path / name).mkdir()
        frozen.units.clear()
        with opened_run(
            tmp_path / name, prompts={"demonstrations": 2}, **teacher(demonstrations=shown)
        ) as run:
            annotate(run)
        assert {len(prompt) for unit in frozen.units for prompt in unit.prompts} == {messages}


def test_a_teacher_that_is_never_right_is_a_clear_stop(
    frozen: StandInTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen.says = lambda prompt, sampling: said("It is so. So the answer is Parrow.")
    with opened_run(tmp_path, 70, **teacher()) as run, pytest.raises(UserError) as caught:
        annotate(run)
    told = str(caught.value)
    assert told.startswith(
        "no rationale was kept of 70; 70 rejected: the teacher's answer is wrong; what it "
        "answered: 'Parrow' where 'Velm' is right; "
    )
    assert "teacher.rationalise" in told
    warned = capsys.readouterr().err
    assert warned.count("nothing good among the first 64 rationales") == 1
    with opened_run(tmp_path, 70, **teacher()) as run, pytest.raises(UserError):
        annotate(run)
    assert len(frozen.units) == 35, "nothing is asked twice"


def brought(folder: Path, *lines: dict[str, Any]) -> dict[str, Any]:
    path = write_lines(folder / "mine.jsonl", lines)
    return {"teacher": {"kind": "file", "path": str(path)}}


def test_a_file_of_rationales_passes_the_same_filters(model_cache: Path, tmp_path: Path) -> None:
    settings = brought(
        tmp_path,
        {"id": "q0", "rationale": "Velm"},
        {"id": "q0", "rationale": right(0)},
        {"id": "q1", "rationale": "Place 1 is in it, says its page.", "answer": "the Velm"},
        {"id": "q1", "rationale": "Place 1 is in it."},
        {"id": "q1", "rationale": "Place 1 is in Parrow.", "answer": "Parrow"},
    )
    with opened_run(tmp_path, **settings) as run:
        run.check_inputs()
        found = annotate(run)
        assert len(training_pairs(run, STAGE, kept_rationales(found))) == 2
    assert [(one.example_id, one.sample, one.kept, one.reason) for one in found] == [
        ("q0", 0, False, "it comes to no answer: give its 'answer', or end it in one"),
        ("q0", 1, True, "right answer"),
        ("q1", 0, True, "right answer"),
        ("q1", 1, False, "it comes to no answer: give its 'answer', or end it in one"),
        ("q1", 2, False, "its answer is wrong"),
        ("q2", 0, False, "the file has no rationale for the question"),
    ]
    line = {"id": "q2", "rationale": right(2)}
    with opened_run(
        tmp_path, **brought(tmp_path, {"id": "q0", "rationale": right(0)}, line)
    ) as run:
        again = annotate(run)
    assert [(one.example_id, one.kept) for one in again] == [
        ("q0", True), ("q1", False), ("q2", True),
    ]  # fmt: skip


def test_unknown_ids_of_a_file_are_refused(
    model_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": f"q{number}", "rationale": right(number)} for number in (0, 7, 8)]
    settings = brought(tmp_path, *lines)
    with opened_run(tmp_path, **settings) as run, pytest.raises(UserError) as caught:
        run.check_inputs()
    assert "2 rationales of '" in str(caught.value)
    assert "have ids of none of the 3 training questions, the first: 'q7'" in str(caught.value)
    settings["teacher"]["unknown_ids"] = "ignore"
    with opened_run(tmp_path, **settings) as run:
        run.check_inputs()
        assert [one.kept for one in annotate(run)] == [True, False, False]
    assert "they are ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no rationale: check it"),
        ("[]\n", "line 1 of .* holds no rationale .it is not a JSON object"),
        ('{"id": "q0", "rationale": "x"}\n{"id": "q0"}\n', "line 2 of .* 'rationale' is missing"),
        ('{"rationale": "x"}\n', "its 'id' is missing"),
        ("{\n", "line 1 of"),
    ],
)
def test_a_file_without_rationales_is_one_sentence(
    model_cache: Path, tmp_path: Path, text: str, why: str
) -> None:
    settings = brought(tmp_path)
    (tmp_path / "mine.jsonl").write_text(text)
    with opened_run(tmp_path, **settings) as run, pytest.raises(UserError, match=why) as caught:
        run.check_inputs()
    assert "\n" not in str(caught.value)


def test_another_teacher_does_not_continue_a_run(frozen: StandInTeacher, tmp_path: Path) -> None:
    with opened_run(tmp_path, **teacher()) as run:
        annotate(run)
    with (
        pytest.raises(UserError, match="those of the teacher 'frozen', but teacher"),
        opened_run(tmp_path, teacher={"kind": "supporting_facts"}),
    ):
        pass


def mixed(prompt: Prompt, sampling: Sampling) -> Completion:
    """Right where there is a hint or the number is even; the seed shows in the text."""
    number = asked_place(prompt)
    if number % 2 and HINT not in prompt[-1].content:
        return said("It is in Parrow. So the answer is Parrow.")
    return said(f"Place {number} is in Velm, says {sampling.seed}. So the answer is Velm.")


def _annotate(folder: Path, pause: float) -> None:
    """What a process does that may be killed."""

    def says(prompt: Prompt, sampling: Sampling) -> Completion:
        with (folder / "asked").open("a") as log:
            log.write(f"{sampling.seed} {prompt[-1].content!r}\n")
        time.sleep(pause)
        return mixed(prompt, sampling)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        take_the_place_of_actors(StandInTeacher(says), patch.setattr)
        settings = teacher(samples=2, temperature=1.0, rationalise=True)
        annotate(stack.enter_context(opened_run(folder, 6, **settings)))


def test_a_kill_loses_nothing_and_nothing_is_asked_twice(model_cache: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL once while it asks plainly, once while it asks with hints."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
    _annotate(straight, 0)
    partial = killed / "run" / "rationales.partial.jsonl"
    for lines in (4, 14):
        child = get_context("fork").Process(target=_annotate, args=(killed, 0.1))
        child.start()
        _wait_for_lines(partial, lines, child)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (killed / "run" / "rationales.jsonl").exists()
        with partial.open("a") as file:
            file.write('{"example_id": "q')  # as a full disk leaves it
    _annotate(killed, 0)
    written = [(folder / "run" / "rationales.jsonl").read_text() for folder in (straight, killed)]
    assert len(written[0].splitlines()) == 6 * 2 + 3 * 2
    assert written[0] == written[1]
    once, asked = (Counter((one / "asked").read_text().splitlines()) for one in (straight, killed))
    assert set(once.values()) == {1}
    assert asked.keys() == once.keys()
    # The unit of two prompts that was in flight at each kill.
    assert (asked - once).total() <= 2 * 2


def _wait_for_lines(path: Path, count: int, child: BaseProcess) -> None:
    until = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until
        assert child.is_alive()
        time.sleep(0.01)
