"""A run's directory has one owner and one set of settings; signals end a run in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lmcot.config import Config, depends, load_config, parse_config
from lmcot.errors import Interrupted, UserError
from lmcot.learner.checkpoints import MARKER
from lmcot.ownership import Mark, OwnedElsewhere, claim
from lmcot.records import Annotation, to_json
from lmcot.run import ownership
from lmcot.run.directory import RunDirectory, read_annotations
from lmcot.run.interruption import Interruption


def settings(**changes: Any) -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "rewards": {"kind": "increasing"},
            "refine": {"start_from": "base"},
            **changes,
        }
    )


LONGER = {"source": "random:llama", "max_new_tokens": 300}


def distilled_settings(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "frozen": {"backend": "transformers", "source": "random:llama"},
        "teacher": {"kind": "supporting_facts"},
        "rewards": {"kind": "guidance"},
        "refine": {},
    }
    return settings(**(values | changes))


def checkpoint(directory: RunDirectory, name: str) -> None:
    folder = directory.checkpoints / name
    folder.mkdir(parents=True)
    (folder / "COMPLETE").write_text("{}")


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught, RunDirectory(path):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_owner_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with RunDirectory(path):
        assert refused(path).startswith(
            f"another lmcot process is writing to the run directory '{path}': wait for it"
        )
    with RunDirectory(path):
        pass


def test_another_process_is_refused_and_its_death_frees_the_directory(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from lmcot.run.directory import RunDirectory\n"
        "with RunDirectory(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        owner.stdout.readline()
        assert refused(tmp_path).startswith("another lmcot process is writing")
        owner.kill()
        owner.wait()
        with RunDirectory(tmp_path):
            pass


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_directory_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / name
    sentence = refused(path)
    assert sentence.startswith(f"the run directory '{path}' cannot be written (")
    assert sentence.endswith("): choose another with --run-dir")


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert refused(tmp_path).startswith(
        f"the disk of the run directory '{tmp_path}' is full: free some space"
    )
    monkeypatch.undo()
    with RunDirectory(tmp_path):  # the refusal let go of it
        pass


def test_the_settings_are_written_with_the_versions_they_ran_with(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.check_config(settings()) == []
    assert not directory.config_file.exists()
    directory.write_config(settings())
    text = directory.config_file.read_text(encoding="utf-8")
    assert "# torch: " in text
    assert "# commit: " in text
    assert parse_config(yaml.safe_load(text)) == settings()


def test_a_fixed_key_cannot_change(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_config(settings())
    directory.finish("refine", steps=1)
    with pytest.raises(UserError) as caught:
        directory.check_config(settings(seed=1, policy={"source": "random:t5"}))
    assert str(caught.value) == (
        f"the run directory '{tmp_path}' was created with another value of policy.source, seed: "
        "restore it, or use a new --run-dir; stages that have begun and depend on it: refine"
    )


def test_before_a_stage_has_begun_all_may_change(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_config(settings())
    changed = settings(seed=1, refine={"start_from": "base", "samples_per_prompt": 2})
    told = ["refine.samples_per_prompt: 2 now, 4 before", "seed: 1 now, 0 before"]
    assert directory.check_config(changed) == told
    # A checkpoint before the first step holds nothing that was learned.
    checkpoint(directory, "step-000000")
    assert directory.check_config(changed) == told
    checkpoint(directory, "step-000001")
    with pytest.raises(UserError, match=r"value of refine.samples_per_prompt, seed: restore it"):
        directory.check_config(changed)


def test_after_distillation_the_settings_of_refinement_may_change(tmp_path: Path) -> None:
    config = distilled_settings()
    directory = RunDirectory(tmp_path)
    directory.write_config(config)
    directory.finish("distill", steps=1)
    later = distilled_settings(
        refine={"samples_per_prompt": 2, "kl": {"kind": "adaptive"}},
        rewards={"kind": "guidance", "f1_weight": 0.25},
        learner={"zero_stage": 0},
    )
    assert "refine.samples_per_prompt: 2 now, 4 before" in directory.check_config(later)
    with pytest.raises(UserError, match=r"another value of distill.epochs: .* depend on it: dist"):
        directory.check_config(distilled_settings(distill={"epochs": 3}))


def test_rationales_that_were_paid_for_hold_what_they_depend_on(tmp_path: Path) -> None:
    """Those from supporting facts cost nothing: they are made again."""
    kept, rejected = (Annotation("q", "frozen", "r", "x", one, "?") for one in (True, False))
    for teacher, annotation, held in (
        ("frozen", kept, True), ("frozen", rejected, False), ("supporting_facts", kept, False),
    ):  # fmt: skip
        directory = RunDirectory(tmp_path)
        directory.write_config(distilled_settings(teacher={"kind": teacher}))
        directory.rationales.write_text(json.dumps(to_json(annotation)) + "\n")
        changed = distilled_settings(teacher={"kind": teacher}, policy=LONGER)
        if held:
            with pytest.raises(UserError, match=r"policy.max_new_tokens: .*depend on it: annota"):
                directory.check_config(changed)
        else:
            assert directory.check_config(changed) == ["policy.max_new_tokens: 300 now, 128 before"]


def test_questions_elsewhere_are_the_same_where_contents_are_compared(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_config(settings())
    directory.finish("refine", steps=1)
    counting = {"kind": "counting"}
    moved = settings(data={"train": {**counting, "examples": 9}, "validation": counting})
    with pytest.raises(UserError, match=r"another value of data.train.examples: restore it"):
        directory.check_config(moved)
    directory.begin("refine", {"data.train": "64 questions with digest 1"})
    assert directory.check_config(moved) == ["data.train.examples: 9 now, 64 before"]
    assert RunDirectory(tmp_path).inputs("refine") == {"data.train": "64 questions with digest 1"}
    assert directory.inputs("distill") == {}


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_damaged_records_of_a_run_are_one_sentence(tmp_path: Path, text: str) -> None:
    directory = RunDirectory(tmp_path)
    for name, read in (
        ("stages.json", lambda: directory.finished("distill")),
        ("inputs.json", lambda: directory.inputs("distill")),
        ("rationales.jsonl", lambda: read_annotations(directory.rationales)),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name) as caught:
            read()
        assert "is damaged" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_fixed_key_counts_though_free_ones_changed_too(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_config(settings())
    directory.finish("refine", steps=1)
    changed = settings(
        refine={"start_from": "base", "steps": 7, "advantage": {"kind": "gae", "lam": 1.0}}
    )
    with pytest.raises(UserError) as caught:
        directory.check_config(changed)
    assert "another value of refine.advantage.lam: restore it" in str(caught.value)


def test_a_free_key_may_change_and_is_told(tmp_path: Path) -> None:
    """One line for each, with both values: a resume with other settings is never silent."""
    directory = RunDirectory(tmp_path)
    directory.write_config(settings())
    assert directory.check_config(settings()) == []
    longer = settings(
        refine={"start_from": "base", "steps": 7},
        checkpoints={"every": 1},
        actors={"address": "auto", "learner": {"count": 2}},
    )
    assert directory.check_config(longer) == [
        "actors.address: 'auto' now, None before",
        "actors.learner.count: 2 now, 1 before",
        "checkpoints.every: 1 now, 10 before",
        "refine.steps: 7 now, 100 before",
    ]
    directory.write_config(longer)
    text = directory.config_file.read_text(encoding="utf-8")
    assert parse_config(yaml.safe_load(text)) == longer
    assert directory.check_config(longer) == []


LEVER_LINES = {
    "refine.optimiser.learning_rate": 1e-7,
    "refine.kl.coefficient": 0.3,
    "refine.entropy_coefficient": 0.01,
    "refine.target_kl": 1.0,
}


@pytest.mark.parametrize("key", LEVER_LINES)
def test_a_lever_may_change_while_its_stage_is_under_way_only(tmp_path: Path, key: str) -> None:
    """What alarms advise to change is taken by the next resume, and told."""
    path = tmp_path / "config.yaml"
    directory = RunDirectory(tmp_path)
    directory.write_config(settings())
    changed = load_config(str(path), [f"{key}={LEVER_LINES[key]}"])
    step = directory.checkpoints / "step-000001"
    step.mkdir(parents=True)
    (step / MARKER).write_text("{}")
    assert directory.begun(settings()) == ["refine"]
    (told,) = directory.check_config(changed)
    assert told.startswith(f"{key}: {LEVER_LINES[key]!r} now")
    directory.finish("refine", steps=1)
    with pytest.raises(UserError, match=f"another value of {key}"):
        directory.check_config(changed)


def test_an_adaptive_coefficient_is_no_lever() -> None:
    adaptive = settings(
        refine={"start_from": "base", "kl": {"kind": "adaptive", "target": 6, "horizon": 1000}}
    )
    assert depends("refine", "refine.kl.coefficient", adaptive)
    assert not depends("refine", "refine.kl.coefficient", settings())
    assert depends("refine", "policy.temperature", settings())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: [", "the file '{0}/config.yaml' is not valid YAML: "),
        # As an older version wrote it.
        (yaml.safe_dump({"refine": {"gamma": 1.0}}), "the run directory '{0}' has settings "
         "that this version of lmcot does not know (unknown key 'refine.gamma': "),
        ("colour: red", "the run directory '{0}' has settings that this version of lmcot "
         "does not know (unknown key 'colour': "),
    ],
)  # fmt: skip
def test_settings_of_a_run_that_are_not_understood(
    tmp_path: Path, text: str, sentence: str
) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        RunDirectory(tmp_path).check_config(settings())
    assert str(caught.value).startswith(sentence.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_finished_stages_are_remembered(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.finished("distill") is None
    directory.finish("distill", steps=3)
    directory.finish("refine")
    again = RunDirectory(tmp_path)
    assert again.finished("distill") == {"steps": 3}
    assert again.finished("refine") == {}
    assert again.finished("evaluate") is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        interruption.check()
        signal.raise_signal(number)
        assert interruption.requested
        assert capsys.readouterr().err.startswith("ending at the next safe point")
        with pytest.raises(Interrupted):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interruption():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with Interruption() as interruption:
            seen.append(signal.getsignal(signal.SIGINT))
            interruption.check()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LEASE_S", 0.3)
    monkeypatch.setattr(ownership, "_LOOK_EVERY_S", 0.02)


def _leave_mark(folder: Path, host: str) -> None:
    """What a process on a machine leaves in a shared folder when it is killed."""
    claim(folder, 1, Mark("of the other", host, str(folder), 7))
    beat = {"session": "of the other", "host": host, "folder": str(folder), "pid": 7, "beats": 1}
    (folder / ownership.OWNER).write_text(json.dumps({**beat, "done": False}))


@pytest.mark.usefixtures("quick")
def test_an_owner_on_another_machine_that_shares_the_folder_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock of a file is no news from another machine on every shared file system."""
    _leave_mark(tmp_path, "elsewhere")
    with RunDirectory(tmp_path) as directory:
        assert directory.claim is not None
        assert directory.claim.number == 2
    assert "the process 7 on elsewhere has been silent for" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_an_owner_on_another_machine_that_lives_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave_mark(tmp_path, "elsewhere")
    beats = iter(range(2, 1000))

    def beat(_: float) -> None:
        file = tmp_path / ownership.OWNER
        file.write_text(json.dumps({**json.loads(file.read_text()), "beats": next(beats)}))

    monkeypatch.setattr(time, "sleep", beat)
    with pytest.raises(OwnedElsewhere, match="process 7 on elsewhere is writing"):
        RunDirectory(tmp_path).__enter__()


def test_an_owner_of_this_machine_that_was_killed_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave_mark(tmp_path, socket.gethostname())
    with RunDirectory(tmp_path):
        pass
    assert capsys.readouterr().err == ""


def test_a_folder_whose_marks_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ownership, "claim", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        RunDirectory(tmp_path).__enter__()
