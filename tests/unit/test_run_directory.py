"""A run's directory has one owner and one set of settings; signals end a run in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lmcot.config import Config, parse_config
from lmcot.errors import Interrupted, UserError
from lmcot.stages.interruption import Interruption
from lmcot.stages.run_directory import RunDirectory


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
        "import pathlib, sys; from lmcot.stages.run_directory import RunDirectory\n"
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
    with pytest.raises(UserError) as caught:
        directory.check_config(settings(seed=1, policy={"source": "random:t5"}))
    assert str(caught.value) == (
        f"the run directory '{tmp_path}' began with another value of policy.source, seed: set it "
        "back, or begin anew with another --run-dir"
    )


def test_a_fixed_key_counts_though_free_ones_changed_too(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_config(settings())
    changed = settings(
        refine={"start_from": "base", "steps": 7, "advantage": {"kind": "gae", "lam": 1.0}}
    )
    with pytest.raises(UserError) as caught:
        directory.check_config(changed)
    assert "another value of refine.advantage.lam: set it back" in str(caught.value)


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


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: [", "the file '{0}/config.yaml' is not valid YAML: "),
        # As an older version wrote it.
        (yaml.safe_dump({"refine": {"gamma": 1.0}}), "the run directory '{0}' began with settings "
         "that this version of lmcot does not know (unknown key 'refine.gamma': "),
        ("colour: red", "the run directory '{0}' began with settings that this version of lmcot "
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
