"""Checkpoints: complete once their marker is written, whenever the process dies."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lmcot.config import Config, parse_config
from lmcot.errors import UserError
from lmcot.learner.checkpoints import MARKER, STATE, CheckpointStore, check_content
from lmcot.learner.layout import Layout, check_layout, check_settings, layout_of
from lmcot.ownership import OwnedElsewhere
from lmcot.records import RunState
from lmcot.storage import place, write_whole

ENGINE = "engine"
"""Where the ranks write."""


def _write_engine(folder: Path) -> None:
    (folder / ENGINE).mkdir()
    (folder / ENGINE / "weights").write_text(folder.name, encoding="utf-8")


def _begin(store: CheckpointStore, state: RunState) -> Path:
    folder = store.begin(state)
    assert isinstance(folder, Path)
    return folder


def _save(store: CheckpointStore, step: int) -> Path:
    state = RunState("refine", step=step)
    folder = _begin(store, state)
    _write_engine(folder)
    store.finish(state, folder, _digests(folder))
    return folder


def _digests(folder: Path) -> dict[str, str]:
    """What the ranks tell of what they wrote."""
    content = (folder / ENGINE / "weights").read_bytes()
    return {f"{ENGINE}/weights": hashlib.sha256(content).hexdigest()}


def _names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir())


def _latest_step(store: CheckpointStore) -> int | None:
    found = store.latest()
    return found[0].step if found else None


def _refusal(store: CheckpointStore) -> str:
    with pytest.raises(UserError) as caught:
        store.latest()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_state_survives_a_round_trip(tmp_path: Path) -> None:
    """[29] all that a resume needs comes back as it was, floats to the bit."""
    state = RunState(
        stage="refine",
        step=12,
        sampler={"epoch": 1, "position": 7},
        kl_controller={"coefficient": 0.1 + 0.2},
        reward_statistics={"mean": 1 / 3, "count": 9.0},
    )
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = _begin(store, state)
    _write_engine(folder)
    store.finish(state, folder, {})
    found = CheckpointStore(tmp_path / "checkpoints").latest()
    assert found == (state, folder)
    assert folder.name == "step-000012"
    assert (folder / ENGINE / "weights").read_text(encoding="utf-8") == "step-000012"


def _rewritten(tmp_path: Path, fields: dict[str, object]) -> CheckpointStore:
    """A store whose newest checkpoint has such a state file, with a marker that fits it."""
    store = CheckpointStore(tmp_path)
    folder = _save(store, 3)
    text = json.dumps(fields)
    (folder / STATE).write_text(text, encoding="utf-8")
    listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    listed[STATE] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / MARKER).write_text(json.dumps(listed), encoding="utf-8")
    return store


_VERSION_1 = {
    "stage": "refine",
    "step": 3,
    "sampler": {"epoch": 0, "position": 12},
    "units_in_flight": ["step-4/0"],
    "kl_controller": {"coefficient": 0.1},
    "reward_statistics": {"mean": 0.5},
    "seeds": {"run": 0},
    "policy_version": 3,
    "versions": {"torch": "2.13.0"},
}


def test_a_checkpoint_of_an_earlier_lmcot_is_read(tmp_path: Path) -> None:
    """Its state says no format, and holds fields that are gone; nothing of use is lost."""
    found = _rewritten(tmp_path, _VERSION_1).latest()
    assert found is not None
    assert found[0] == RunState(
        "refine", 3, {"epoch": 0, "position": 12}, {"coefficient": 0.1}, {"mean": 0.5}
    )


def test_fields_that_no_version_had_are_damage(tmp_path: Path) -> None:
    """Also fields of version 1 in a file of version 2."""
    for fields in ({**_VERSION_1, "other": 1}, {**_VERSION_1, "format": 2}, [1]):
        assert "is damaged (state.json: " in _refusal(_rewritten(tmp_path, fields))  # type: ignore[arg-type]


def test_a_checkpoint_of_a_later_lmcot_is_refused_by_its_version(tmp_path: Path) -> None:
    told = _refusal(_rewritten(tmp_path, {"format": 3, "stage": "refine", "new": 1}))
    assert "has format 3, and this lmcot reads up to 2: resume with the version" in told


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "missing").latest() is None
    assert CheckpointStore(tmp_path).latest() is None


def test_the_marker_lists_every_file_with_its_size_and_digest(tmp_path: Path) -> None:
    """[29] those below folders too, but not itself."""
    folder = _save(CheckpointStore(tmp_path), 1)
    listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    state = (folder / STATE).read_bytes()
    assert listed == {
        f"{ENGINE}/weights": {
            "bytes": len("step-000001"),
            "sha256": hashlib.sha256(b"step-000001").hexdigest(),
        },
        STATE: {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()},
    }


def test_a_checkpoint_that_was_never_finished_is_passed_over(tmp_path: Path) -> None:
    """[29] no marker while the ranks write, nor the state; what is killed there does not count."""
    store = CheckpointStore(tmp_path)
    _save(store, 1)
    folder = _begin(store, RunState("refine", step=2))
    assert list(folder.iterdir()) == []
    _write_engine(folder)
    assert _names(folder) == [ENGINE]
    assert _names(tmp_path) == ["step-000001", "step-000002"]
    assert _latest_step(store) == 1
    (_save(store, 3) / MARKER).unlink()
    assert _latest_step(store) == 1


def test_what_was_never_finished_does_not_stay_for_ever(tmp_path: Path) -> None:
    """A killed process's half checkpoint goes with the next whole one."""
    store = CheckpointStore(tmp_path, keep=2)
    _write_engine(_begin(store, RunState("refine", step=3)))
    (tmp_path / "distill-step-000003").mkdir()
    _save(store, 4)
    assert _names(tmp_path) == ["distill-step-000003", "step-000004"]


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
    monkeypatch.setattr(shutil, "rmtree", _killed)
    with pytest.raises(KeyboardInterrupt):
        _save(store, 2)
    assert _latest_step(store) == 1


def test_a_kill_while_an_old_checkpoint_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[29] the new one is complete by then; what is left of the old one is none."""
    store = CheckpointStore(tmp_path, keep=1)
    _save(store, 1)
    monkeypatch.setattr(shutil, "rmtree", _killed)
    with pytest.raises(KeyboardInterrupt):
        _save(store, 2)
    monkeypatch.undo()
    assert _latest_step(store) == 2
    shutil.rmtree(tmp_path / "step-000002")
    assert _latest_step(store) is None


def _killed(folder: Path) -> None:
    (folder / STATE).unlink()
    raise KeyboardInterrupt


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


def test_old_ones_stay_until_the_new_one_is_complete(tmp_path: Path) -> None:
    """[29] at every moment one complete checkpoint is there, even if only one is kept."""
    store = CheckpointStore(tmp_path, keep=1)
    _save(store, 1)
    state = RunState("refine", step=2)
    folder = _begin(store, state)
    _write_engine(folder)
    assert _latest_step(store) == 1
    store.finish(state, folder, {})
    assert _names(tmp_path) == ["step-000002"]


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


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        (f"{ENGINE}/weights", 4, "engine/weights has 4 of its 11 bytes"),
        (f"{ENGINE}/weights", 0, "engine/weights has 0 of its 11 bytes"),
        (f"{ENGINE}/weights", None, "engine/weights is missing"),
        (STATE, None, "state.json is missing"),
        (STATE, 9, "state.json has 9 of its "),
        (MARKER, 30, "COMPLETE cannot be read"),
        (MARKER, 0, "COMPLETE cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, size: int | None, said: str) -> None:
    """[29] nothing is taken up from half a checkpoint, and nobody falls back silently."""
    store = CheckpointStore(tmp_path)
    _save(store, 1)
    folder = _save(store, 2)
    if size is None:
        (folder / name).unlink()
    else:
        os.truncate(folder / name, size)
    sentence = _refusal(store)
    assert sentence.startswith(f"the checkpoint '{folder}' is damaged ({said}")
    assert sentence.endswith("delete it, and the same command continues from the one before")
    shutil.rmtree(folder)
    assert _latest_step(store) == 1


def test_a_byte_of_the_state_that_has_changed_is_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = _save(store, 2)
    text = (folder / STATE).read_text(encoding="utf-8")
    (folder / STATE).write_text(text.replace('"step": 2', '"step": 3'), encoding="utf-8")
    assert f"is damaged (the content of {STATE} has changed)" in _refusal(store)


def test_a_byte_of_the_ranks_files_that_has_changed_is_damage(tmp_path: Path) -> None:
    """Whoever reads a file compares it: the ranks theirs, on their own nodes."""
    folder = _save(CheckpointStore(tmp_path), 2)
    check_content(folder, f"{ENGINE}/weights")
    (folder / ENGINE / "weights").write_text("step-000003", encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged \(the content of engine/weights has changed\)"):
        check_content(folder, f"{ENGINE}/weights")


def test_a_marker_that_lists_sizes_alone_is_read(tmp_path: Path) -> None:
    """Earlier versions wrote no digests: sizes are compared then."""
    store = CheckpointStore(tmp_path)
    folder = _save(store, 2)
    listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    sizes = {name: one["bytes"] for name, one in listed.items()}
    (folder / MARKER).write_text(json.dumps(sizes), encoding="utf-8")
    assert _latest_step(store) == 2
    os.truncate(folder / ENGINE / "weights", 4)
    assert "engine/weights has 4 of its 11 bytes" in _refusal(store)


def test_a_folder_in_a_files_place_is_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = _save(store, 2) / ENGINE / "weights"
    path.unlink()
    path.mkdir()
    assert "engine/weights is missing" in _refusal(store)


@pytest.mark.parametrize("text", ['{"stage": "refine", "steps": 2}', "[1]", "{"])
def test_a_state_that_is_not_understood_is_damage(tmp_path: Path, text: str) -> None:
    """Of the right size, but not what this version writes."""
    store = CheckpointStore(tmp_path)
    folder = _save(store, 2)
    (folder / STATE).write_text(text, encoding="utf-8")
    listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    facts = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / MARKER).write_text(json.dumps({**listed, STATE: facts}), encoding="utf-8")
    assert _refusal(store).startswith(f"the checkpoint '{folder}' is damaged ({STATE}: ")


@pytest.mark.parametrize(
    "name",
    ["layout.json", f".{STATE}.{os.getpid()}.partial", f".{MARKER}.{os.getpid()}.partial"],
    ids=["layout", "state", "marker"],
)
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, name: str) -> None:
    """[29] while the engine's part, the state or the marker is written: a true ENOSPC."""
    store = CheckpointStore(tmp_path, keep=1)
    _save(store, 1)
    state = RunState("refine", step=2)
    folder = _begin(store, state)
    (folder / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        _write_all(store, state, folder)
    assert caught.value.errno == errno.ENOSPC
    assert _names(tmp_path) == ["step-000001", "step-000002"]
    assert not (folder / MARKER).exists()
    assert _latest_step(store) == 1
    _write_all(store, state, _begin(store, state))  # there is room again
    assert _latest_step(store) == 2
    assert _names(tmp_path) == ["step-000002"]


def _write_all(store: CheckpointStore, state: RunState, folder: Path) -> None:
    _layout().write(folder)
    store.finish(state, folder, {})


SETTINGS: dict[str, Any] = {
    "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
    "policy": {"source": "random:llama"},
    "rewards": {"kind": "increasing"},
    "refine": {"start_from": "base"},
}


def _config(**changes: Any) -> Config:
    return parse_config({**SETTINGS, **changes})


def _module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


def _layout(**changes: Any) -> Layout:
    return replace(layout_of(_config(), _module()), **changes)


def test_a_layout_says_how_the_state_is_cut_up(tmp_path: Path) -> None:
    """[29] facts of the settings, and of what is trained."""
    config = _config(
        actors={"learner": {"count": 3}}, learner={"zero_stage": 3, "offload": "optimiser"}
    )
    layout = layout_of(config, _module().bfloat16())
    assert asdict(layout) == {
        "learners": 3,
        "zero_stage": 3,
        "offload": "optimiser",
        "dtype": "bfloat16",
        "parameters": layout.parameters,
    }
    layout.write(tmp_path)
    check_layout(tmp_path, layout)
    check_settings(tmp_path, config)


def test_a_layout_tells_models_apart() -> None:
    """By names and shapes of what trains: values, and what is frozen, do not matter."""
    digest = _layout().parameters
    assert layout_of(_config(), _module()).parameters == digest
    longer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 1))
    longer[2].requires_grad_(False)
    assert layout_of(_config(), longer).parameters == digest
    frozen = _module()
    next(frozen.parameters()).requires_grad_(False)
    others = [
        frozen,
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
    ]
    digests = {layout_of(_config(), other).parameters for other in others}
    assert len(digests | {digest}) == 4


def test_a_layout_sees_through_partitioning() -> None:
    """At stage 3 a parameter is empty, and its shape is DeepSpeed's ``ds_shape``."""
    module = _module()
    for parameter in module.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert layout_of(_config(), module) == _layout()


@pytest.mark.parametrize(
    ("fact", "before", "said"),
    [
        ("learners", 2, "written with actors.learner.count 2, not 1: "),
        ("zero_stage", 3, "written with learner.zero_stage 3, not 2: "),
        ("offload", "optimiser", "written with learner.offload 'optimiser', not 'none': "),
    ],
)
def test_a_setting_to_put_back_is_named(tmp_path: Path, fact: str, before: Any, said: str) -> None:
    """[29] before any actor starts, and again by the learner itself."""
    _layout(**{fact: before}).write(tmp_path)
    sentences = []
    with pytest.raises(UserError) as caught:
        check_settings(tmp_path, _config())
    sentences.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        check_layout(tmp_path, _layout())
    sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]
    assert sentences[0] == (
        f"the checkpoint '{tmp_path}' was {said}DeepSpeed's state fits only that, so restore it"
    )


def test_another_dtype_is_named_by_the_learner(tmp_path: Path) -> None:
    """[29] ``auto`` may mean another one on another machine: only the learner knows."""
    _layout(dtype="bfloat16").write(tmp_path)
    check_settings(tmp_path, _config())
    with pytest.raises(UserError, match=r"written with policy\.dtype 'bfloat16', not 'float32'"):
        check_layout(tmp_path, _layout())


def test_another_model_is_refused(tmp_path: Path) -> None:
    """[29] which only the learner can tell: the settings alone are the same."""
    _layout(parameters="0" * 16).write(tmp_path)
    check_settings(tmp_path, _config())
    with pytest.raises(UserError) as caught:
        check_layout(tmp_path, _layout())
    assert str(caught.value) == (
        f"the checkpoint '{tmp_path}' is of another model (its parameters differ): use "
        "another --run-dir"
    )


@pytest.mark.parametrize("text", [None, "", "{", '{"learners": 1'])
def test_a_layout_that_cannot_be_read_is_damage(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "layout.json").write_text(text, encoding="utf-8")
    checks: list[Callable[[], None]] = [
        partial(check_settings, tmp_path, _config()),
        partial(check_layout, tmp_path, _layout()),
    ]
    for check in checks:
        with pytest.raises(UserError) as caught:
            check()
        assert str(caught.value).startswith(
            f"the checkpoint '{tmp_path}' is damaged (layout.json: "
        )
        assert "\n" not in str(caught.value)


class _Owned:
    """A claim of a number that is valid until it is lost."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.lost = False

    def check_persistently(self) -> None:
        if self.lost:
            raise OwnedElsewhere("another process has taken over the run")


def _owned(root: Any, number: int, **options: Any) -> tuple[CheckpointStore, _Owned]:
    claim: Any = _Owned(number)
    return CheckpointStore(root, claim=claim, **options), claim


def _save_at(store: CheckpointStore, step: int) -> Any:
    state = RunState("refine", step=step)
    folder = store.begin(state)
    write_whole(folder / ENGINE / "weights", folder.name)
    store.finish(state, folder, {})
    return folder


def test_an_owner_that_lost_the_run_clears_and_writes_nothing(tmp_path: Path) -> None:
    store, claim = _owned(tmp_path, 1, keep=1)
    _save(store, 2)
    state = RunState("refine", step=4)
    folder = _begin(store, state)
    _write_engine(folder)
    claim.lost = True
    with pytest.raises(OwnedElsewhere):
        store.finish(state, folder, _digests(folder))
    assert _names(folder) == [ENGINE]
    with pytest.raises(OwnedElsewhere):
        store.begin(RunState("refine", step=2))
    assert _latest_step(store) == 2


def test_at_a_url_each_owner_has_folders_of_its_own() -> None:
    root = place(f"memory://{uuid.uuid4().hex}/checkpoints")
    first, _ = _owned(root, 1)
    second, _ = _owned(root, 2)
    assert _save_at(first, 2).name == "step-000002"
    late = first.begin(RunState("refine", step=4))
    write_whole(late / ENGINE / "weights", "of an upload that is still under way")
    folder = _save_at(second, 4)
    assert folder.name == "step-000004-2"
    write_whole(late / ENGINE / "weights", "of an upload that came last")
    found = CheckpointStore(root).latest()
    assert found == (RunState("refine", step=4), folder)
    assert (folder / ENGINE / "weights").read_text() == folder.name
    assert CheckpointStore(root).steps() == [2, 4]
    _save_at(second, 6)
    assert sorted(path.name for path in root.iterdir()) == ["step-000004-2", "step-000006-2"]


def test_a_marker_that_an_earlier_owner_writes_late_does_not_count() -> None:
    root = place(f"memory://{uuid.uuid4().hex}/checkpoints")
    _save_at(_owned(root, 1)[0], 10)
    older, newer = _owned(root, 2)[0], _owned(root, 3)[0]
    _save_at(newer, 12)
    _save_at(older, 20)
    found = CheckpointStore(root).latest()
    assert found is not None
    assert found[1].name == "step-000012-3"
    _save_at(newer, 14)
    assert sorted(path.name for path in root.iterdir()) == ["step-000012-3", "step-000014-3"]


def test_a_copy_on_a_disk_goes_on_with_the_names_that_are_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 2).rename(tmp_path / "step-000002-5")
    copied, _ = _owned(tmp_path, 1)
    assert _save(copied, 4).name == "step-000004-5"
    assert _latest_step(CheckpointStore(tmp_path)) == 4
