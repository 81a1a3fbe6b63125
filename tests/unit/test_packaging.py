"""What holds of the package as a whole: rooms, cheap imports, pins, the ahead-of-time build."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lmcot.learner import build_ops
from lmcot.learner.build_ops import remove_stale_lock

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_room_imports_only_from_the_floors_below_it() -> None:
    result = run(str(BIN / "lint-imports"), "--no-cache")
    assert result.returncode == 0, result.stdout + result.stderr


def test_importing_the_command_line_imports_no_torch() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'deepspeed'}"
    code = f"import lmcot, lmcot.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_questions_are_described_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "Is Lyon a city?", "answer": true}\n', encoding="utf-8")
    heavy = "{'torch', 'ray', 'transformers', 'datasets'}"
    given = f"['data', {str(file)!r}, '--task', 'boolean']"
    code = f"import sys; from lmcot.cli import main; main({given}); "
    result = run(sys.executable, "-c", f"{code}print(sorted({heavy} & set(sys.modules)))")
    described = result.stdout.splitlines()
    assert described[-1] == "[]", result.stdout + result.stderr
    assert "  passages of a question: none" in described
    assert not any("context" in line for line in described)


def test_help_comes_at_once() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = run(sys.executable, "-m", "lmcot.cli", "--help")
        seconds.append(time.perf_counter() - started)
        assert result.returncode == 0, result.stderr
        assert "train" in result.stdout
    # It reads the settings' classes, but not torch, which alone takes seconds.
    assert min(seconds) < 2.0


def test_every_dependency_has_a_tested_version_that_fits_its_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    extras = [entry for extra in project["optional-dependencies"].values() for entry in extra]
    for entry in project["dependencies"] + extras:
        requirement = Requirement(entry)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} is not pinned"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is out of bounds"
    # A local suffix such as +cpu would bind the constraints to one build of torch.
    assert not [name for name, version in pins.items() if "+" in version]


def test_the_lock_of_a_killed_build_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not remove_stale_lock(lock)
    lock.touch()
    assert remove_stale_lock(lock)
    assert not lock.exists()


def test_a_build_that_ends_removes_its_lock_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes the file before it removes it."""
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr("lmcot.learner.build_ops.time.sleep", lambda _: lock.unlink())
    assert not remove_stale_lock(lock)


def test_the_lock_of_a_living_build_stays(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = f"import os; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as build:
        assert build.stdout is not None
        build.stdout.readline()
        assert not remove_stale_lock(lock)
        build.kill()
        build.wait()
        assert remove_stale_lock(lock)


def test_an_engine_removes_the_locks_of_killed_builds_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(build_ops, "_build_folder", lambda op: tmp_path)
    build_ops.remove_stale_locks()
    assert not lock.exists()
    assert "removed the lock that an interrupted build of" in capsys.readouterr().out
