"""Checkpoints: complete once their marker is written, whenever the process dies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lmcot.learner.checkpoints import ENGINE, MARKER, STATE, CheckpointStore
from lmcot.records import RunState


def _write_engine(folder: Path) -> None:
    (folder / ENGINE).mkdir()
    (folder / ENGINE / "weights").write_text(folder.name, encoding="utf-8")


def _save(store: CheckpointStore, step: int) -> Path:
    return store.save(RunState("refine", step=step), _write_engine)


def _names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir())


def _latest_step(store: CheckpointStore) -> int | None:
    found = store.latest()
    return found[0].step if found else None


def test_state_survives_a_round_trip(tmp_path: Path) -> None:
    """[29] all that a resume needs comes back as it was, floats to the bit."""
    state = RunState(
        stage="refine",
        step=12,
        sampler={"epoch": 1, "position": 7},
        units_in_flight=["12/0", "12/1"],
        kl_controller={"coefficient": 0.1 + 0.2},
        reward_statistics={"mean": 1 / 3, "count": 9.0},
        seeds={"run": 2**62},
        policy_version=13,
        versions={"torch": "2.13.0"},
    )
    folder = CheckpointStore(tmp_path / "checkpoints").save(state, _write_engine)
    found = CheckpointStore(tmp_path / "checkpoints").latest()
    assert found == (state, folder)
    assert folder.name == "step-000012"
    assert (folder / ENGINE / "weights").read_text(encoding="utf-8") == "step-000012"


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "missing").latest() is None
    assert CheckpointStore(tmp_path).latest() is None


def test_the_marker_is_written_last(tmp_path: Path) -> None:
    """[29] no marker while the engine writes; a checkpoint without one is passed over."""
    store = CheckpointStore(tmp_path)
    _save(store, 1)

    def interrupted(folder: Path) -> None:
        assert not (folder / MARKER).exists()
        assert not (folder / STATE).exists()
        _write_engine(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(RunState("refine", step=2), interrupted)
    assert _names(tmp_path) == ["step-000001", "step-000002"]
    assert _latest_step(store) == 1
    (_save(store, 3) / MARKER).unlink()
    assert _latest_step(store) == 1


def test_an_unfinished_checkpoint_is_written_anew(tmp_path: Path) -> None:
    """[29] what a killed process left does not mix with what is written now."""
    store = CheckpointStore(tmp_path)
    leftover = tmp_path / "step-000004" / ENGINE
    leftover.mkdir(parents=True)
    (leftover / "old").touch()
    folder = _save(store, 4)
    assert _names(folder / ENGINE) == ["weights"]
    assert _latest_step(store) == 4


def test_a_kill_while_a_checkpoint_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[29] a checkpoint half deleted is not taken for a complete one."""
    store = CheckpointStore(tmp_path)
    _save(store, 1)
    _save(store, 2)

    def killed(folder: Path, *args: Any) -> None:
        (folder / STATE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        _save(store, 2)
    assert _latest_step(store) == 1


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    kept = []
    for step in (1, 2, 3, 10):
        _save(store, step)
        kept.append(_names(tmp_path))
    assert kept == [
        ["step-000001"],
        ["step-000001", "step-000002"],
        ["step-000002", "step-000003"],
        ["step-000003", "step-000010"],
    ]
    assert _latest_step(store) == 10


def test_newest_means_the_highest_step(tmp_path: Path) -> None:
    """The names' order is the steps' order beyond six digits too."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (999_998, 999_999, 1_000_000):
        _save(store, step)
    assert _names(tmp_path) == ["step-1000000", "step-999999"]
    assert _latest_step(store) == 1_000_000


def test_stages_do_not_see_each_others_checkpoints(tmp_path: Path) -> None:
    """``step-`` is the end of ``distill-step-``, and must not be taken for it."""
    refine = CheckpointStore(tmp_path, keep=1)
    distill = CheckpointStore(tmp_path, prefix="distill-step-", keep=1)
    _save(distill, 50)
    assert refine.latest() is None
    _save(refine, 3)
    _save(refine, 4)
    assert _names(tmp_path) == ["distill-step-000050", "step-000004"]
    assert (_latest_step(refine), _latest_step(distill)) == (4, 50)
    (tmp_path / "step-000009-old").mkdir()
    (tmp_path / "step-000009-old" / MARKER).touch()
    assert _latest_step(refine) == 4
