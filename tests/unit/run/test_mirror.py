"""A run at a URL and the folder of its driver: what is uploaded when, and who owns it."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcot import ownership as marks
from lmcot import storage
from lmcot.errors import UserError
from lmcot.files import write_atomically
from lmcot.ownership import MARKS, OwnedElsewhere
from lmcot.run import mirror as module
from lmcot.run import ownership
from lmcot.run.directory import DirectoryInUse, RunDirectory
from lmcot.run.mirror import Mirror, working_folder
from lmcot.run.ownership import OWNER, Ownership
from lmcot.storage import place, remove, versions_of, write_whole


class Machine(Mirror):
    """The mirror of a machine, with the ownership that its run directory has."""

    def __init__(self, url: Any, folder: Path) -> None:
        self.ownership = Ownership(url, folder)
        super().__init__(url, folder, self.ownership)

    def close(self) -> None:
        super().close()
        self.ownership.release()


Machines = Callable[[str], Machine]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LEASE_S", 5.0)
    monkeypatch.setattr(ownership, "BEAT_S", 600.0)  # what a test looks at, it does itself
    monkeypatch.setattr(module, "SYNC_S", 600.0)
    monkeypatch.setattr(ownership, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(marks, "SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "PATIENCE_S", 0.0)


@pytest.fixture
def url() -> Any:
    """Of a run that is not there, in a store that is this process's memory."""
    return place(f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def machine(url: Any, tmp_path: Path) -> Iterator[Machines]:
    """Makes the mirror of a machine, by the machine's name: its folder stays from one to the
    next."""
    made: list[Machine] = []

    def make(name: str) -> Machine:
        (tmp_path / name).mkdir(exist_ok=True)
        made.append(Machine(url, tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        kill(one)


def kill(one: Machine) -> None:
    """Its process is gone, without a word."""
    one._ended.set()
    one.ownership.stop()


def names(url: Any) -> list[str]:
    return [name for name in versions_of(url) if not name.startswith((OWNER, MARKS))]


def wait_for_upload(url: Any, name: str) -> None:
    deadline = time.monotonic() + 10
    while names(url) != [name]:
        assert time.monotonic() < deadline, f"waited 10 s for the upload of {name}"
        time.sleep(0.02)


def write(folder: Path, name: str, text: str = "x") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def test_what_is_new_changed_or_gone_is_so_at_the_url(
    machine: Machines, url: Any, tmp_path: Path
) -> None:
    here = tmp_path / "a"
    one = machine("a")
    one.open()
    write(here, "metrics.jsonl", "1\n")
    write(here, "tensorboard/refine/events", "e")
    write(here, "rollouts/step-000001.jsonl")
    one.sync()
    assert names(url) == [
        "metrics.jsonl",
        "rollouts/step-000001.jsonl",
        "tensorboard/refine/events",
    ]
    before = versions_of(url)
    write(here, "metrics.jsonl", "1\n2\n")
    (here / "tensorboard" / "refine" / "events").unlink()
    one.sync()
    assert (url / "metrics.jsonl").read_text() == "1\n2\n"
    assert names(url) == ["metrics.jsonl", "rollouts/step-000001.jsonl"]
    same = "rollouts/step-000001.jsonl"
    assert versions_of(url)[same] == before[same], "uploaded once"


def test_only_what_was_added_to_a_file_is_uploaded(
    machine: Machines, url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a"
    one = machine("a")
    one.open()
    write(here, "metrics.jsonl", "1\n")
    one.sync()
    whole: list[str] = []
    real = storage.put
    monkeypatch.setattr(module, "put", lambda file, content: whole.append(file.name))
    write(here, "metrics.jsonl", "1\n2\n")
    one.sync()
    write(here, "metrics.jsonl", "1\n2\n3\n")
    one.sync()
    assert (url / "metrics.jsonl").read_text() == "1\n2\n3\n"
    assert whole == []
    monkeypatch.setattr(module, "put", real)
    write(here, "metrics.jsonl", "1\nanother 2\n")
    one.sync()
    assert (url / "metrics.jsonl").read_text() == "1\nanother 2\n"
    write_whole(url / "metrics.jsonl", "somebody else's")
    write(here, "metrics.jsonl", "1\nanother 2\n3\n")
    one.sync()
    assert (url / "metrics.jsonl").read_text() == "1\nanother 2\n3\n"


def test_a_folder_of_an_earlier_version_uploads_its_files_again(
    machine: Machines, url: Any, tmp_path: Path
) -> None:
    """Its record says no more than sizes and times of what it uploaded."""
    one = machine("a")
    one.open()
    write(tmp_path / "a", "metrics.jsonl", "1\n")
    one.close()
    file = tmp_path / "a" / ".mirror.json"
    record = json.loads(file.read_text())
    record["pushed"] = {name: stamp[:2] for name, stamp in record["pushed"].items()}
    del record["before"]
    file.write_text(json.dumps(record))
    write(tmp_path / "a", "metrics.jsonl", "1\n2\n")
    machine("a").open()
    assert (url / "metrics.jsonl").read_text() == "1\n2\n"


def test_what_is_half_written_or_the_learners_own_stays(
    machine: Machines, url: Any, tmp_path: Path
) -> None:
    write_whole(url / "refined" / "config.json", "{}")
    write_whole(url / "distilled-adapters" / "adapter_config.json", "{}")
    write_whole(url / "checkpoints" / "step-000001" / "COMPLETE", "{}")
    one = machine("a")
    one.open()
    write(tmp_path / "a", ".metrics.jsonl.7.partial")
    write(tmp_path / "a", ".candidate/config.json")
    one.sync()
    assert names(url) == [
        "checkpoints/step-000001/COMPLETE", "distilled-adapters/adapter_config.json",
        "refined/config.json",
    ]  # fmt: skip


def test_that_a_stage_is_done_is_told_after_what_it_left(
    machine: Machines, url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a"
    one = machine("a")
    one.open()
    write(here, "report.json")
    write(here, "stages.json", '{"evaluate": {}}')
    put: list[str] = []
    real = storage.put

    def noting(file: Any, content: bytes) -> None:
        if not put:  # while the upload is under way, another stage comes to its end
            write_atomically(here / "stages.json", '{"evaluate": {}, "later": {}}')
            write(here, "later.json")
        put.append(file.name)
        real(file, content)

    monkeypatch.setattr(module, "put", noting)
    one.sync()
    assert put == ["report.json", "stages.json"]
    assert json.loads((url / "stages.json").read_text()) == {"evaluate": {}}
    one.sync()
    assert put[2:] == ["later.json", "stages.json"]
    assert "later" in json.loads((url / "stages.json").read_text())


def test_another_machine_goes_on_with_what_is_at_the_url(
    machine: Machines, url: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = machine("a")
    first.open()
    write(tmp_path / "a", "metrics.jsonl", "1\n")
    first.close()
    write(tmp_path / "b", "metrics.jsonl", "of long ago")
    write(tmp_path / "b", "rollouts/step-000009.jsonl")
    second = machine("b")
    started = time.monotonic()
    second.open()
    assert time.monotonic() - started < ownership.LEASE_S, "nobody is waited for"
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == "1\n"
    assert not (tmp_path / "b" / "rollouts").exists()
    assert "fetched the run as it is at" in capsys.readouterr().err
    assert names(url) == ["metrics.jsonl"]


def test_a_run_that_was_copied_there_by_hand_is_taken_up(
    machine: Machines, url: Any, tmp_path: Path
) -> None:
    write_whole(url / "metrics.jsonl", "1\n")
    write_whole(url / "distilled" / "config.json", "{}")
    machine("a").open()
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == "1\n"
    assert not (tmp_path / "a" / "distilled").exists()
    assert names(url) == ["distilled/config.json", "metrics.jsonl"]


def test_what_is_gone_on_both_sides_is_no_obstacle(
    machine: Machines, url: Any, tmp_path: Path
) -> None:
    one = machine("a")
    one.open()
    write(tmp_path / "a", "rationales.partial.jsonl")
    one.sync()
    (tmp_path / "a" / "rationales.partial.jsonl").unlink()
    remove(url / "rationales.partial.jsonl")
    one.sync()
    assert names(url) == []


def test_a_machine_that_comes_back_first_uploads_what_it_could_not(
    machine: Machines, url: Any, tmp_path: Path
) -> None:
    first = machine("a")
    first.open()
    write(tmp_path / "a", "metrics.jsonl", "1\n")
    first.sync()
    write(tmp_path / "a", "metrics.jsonl", "1\n2\n")
    kill(first)
    started = time.monotonic()
    machine("a").open()
    assert time.monotonic() - started < ownership.LEASE_S, "the dead one was this very folder's"
    assert (url / "metrics.jsonl").read_text() == "1\n2\n"


def test_a_machine_that_comes_back_second_takes_what_the_other_did(
    machine: Machines, url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "LEASE_S", 0.3)
    first = machine("a")
    first.open()
    write(tmp_path / "a", "metrics.jsonl", "1\n2\n3 of the dead\n")
    kill(first)  # before the upload
    other = machine("b")
    other.open()
    write(tmp_path / "b", "metrics.jsonl", "1\n2 of the other\n")
    other.close()
    machine("a").open()
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == "1\n2 of the other\n"


def test_a_living_owner_is_left_alone(machine: Machines, url: Any) -> None:
    first = machine("a")
    first.open()
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.1):
            first.ownership._beat()

    living = threading.Thread(target=live)
    living.start()
    try:
        with pytest.raises(OwnedElsewhere, match=f"the process {os.getpid()} on .* is writing"):
            machine("b").open()
    finally:
        ended.set()
        living.join()
    first.sync()  # is still the owner


def test_a_silent_owner_counts_as_dead_and_ends_when_it_finds_out(
    machine: Machines, url: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = machine("a")
    first.open()
    monkeypatch.setattr(ownership, "LEASE_S", 0.3)
    machine("b").open()
    assert "has been silent for" in capsys.readouterr().err
    write(tmp_path / "a", "metrics.jsonl", "of the one that was silent")
    with pytest.raises(OwnedElsewhere, match="has taken over"):
        first.sync()
    assert names(url) == []


def test_an_owner_hears_of_the_next_one_from_its_heartbeat(
    machine: Machines, url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of a stage asks often, and must not wait for the store."""
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    first = machine("a")
    first.open()
    first.ownership.check()
    with monkeypatch.context() as away:
        away.setattr(ownership, "LEASE_S", 0.0)
        away.setattr(marks, "read_mark", _refuse)
        first.ownership.check()  # a store that is away ends no run
        with pytest.raises(OSError, match="no route"):
            first.ownership.confirm()
    claim = first.ownership.claim
    assert claim is not None
    marks.claim(url, claim.number + 1, marks.Mark("another", "there", "/", 7))
    first.ownership._thread.join(10)  # it ends with the ownership
    with pytest.raises(OwnedElsewhere, match="process 7 on there has taken over"):
        first.ownership.check()


def test_the_thread_uploads_and_tells_that_its_owner_lives(
    machine: Machines, url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SYNC_S", 0.05)
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    first = machine("a")
    first.open()
    write(tmp_path / "a", "metrics.jsonl", "1\n")
    with pytest.raises(OwnedElsewhere):
        machine("b").open()
    wait_for_upload(url, "metrics.jsonl")
    first.close()


def test_storage_that_fails_costs_nothing_but_time(
    machine: Machines, url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("a")
    one.open()
    write(tmp_path / "a", "metrics.jsonl", "1\n")
    with monkeypatch.context() as broken:
        broken.setattr(module, "put", _refuse)
        with pytest.raises(UserError, match=r"cannot be reached \(no route\)"):
            one.sync()
    one.sync()
    assert (url / "metrics.jsonl").read_text() == "1\n"


def _refuse(*_: Any) -> None:
    raise OSError("no route")


def test_the_thread_says_once_that_storage_fails_and_goes_on(
    machine: Machines, url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "SYNC_S", 0.02)
    one = machine("a")
    one.open()
    with monkeypatch.context() as broken:
        broken.setattr(module, "put", _refuse)
        write(tmp_path / "a", "metrics.jsonl", "1\n")
        time.sleep(0.3)
    assert capsys.readouterr().err.count("retrying every") == 1
    wait_for_upload(url, "metrics.jsonl")


def test_a_run_directory_at_a_url(url: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory(url) as directory:
        assert directory.path == working_folder(url)
        assert str(directory.policy("refined")) == f"{url}/refined"
        directory.finish("annotate", kept=3)
        with pytest.raises(DirectoryInUse, match="another lmcot process"), RunDirectory(url):
            pass
    assert names(url) == ["stages.json"]
    assert json.loads((url / OWNER).read_text())["done"]
    remove(directory.path)  # the machine's disk is another now
    with RunDirectory(url) as directory:
        assert directory.finished("annotate") == {"kept": 3}


@pytest.mark.parametrize("content", ["", '{"sess', "[]", '{"session": "a"}', "\ufffd"])
@pytest.mark.parametrize("name", [OWNER, f"{MARKS}/000001.json"])
def test_a_damaged_record_of_the_owner_is_named(
    name: str, content: str, machine: Machines, url: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(marks, "_PAUSE_S", 0.0)
    one = machine("a")
    one.open()
    write(tmp_path / "a", "metrics.jsonl")
    write_whole(url / name, content)
    told = f"'{url / name}', which says who writes to this run, is damaged.*delete the file"
    if name != OWNER:  # an owner looks at its mark only
        with pytest.raises(UserError, match=told):
            one.sync()
    with pytest.raises(UserError, match=told):
        machine("b").open()
    kill(one)
    remove(url / name)
    machine("a").open()
    assert names(url) == ["metrics.jsonl"]


def test_a_record_of_the_owner_that_is_being_written_is_read_again(
    machine: Machines, url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("a")
    one.open()
    mark = url / MARKS / "000001.json"
    whole = mark.read_text()
    write_whole(mark, whole[:20])
    monkeypatch.setattr(time, "sleep", lambda _: write_whole(mark, whole))
    one.sync()


@pytest.mark.parametrize("content", ["{", "[]", '{"session": "a"}', '{"pushed": {}}'])
def test_a_damaged_record_of_uploads_is_named(
    content: str, machine: Machines, tmp_path: Path
) -> None:
    one = machine("a")
    write(tmp_path / "a", ".mirror.json", content)
    with pytest.raises(UserError, match=r"mirror\.json' is damaged.*delete the folder"):
        one.open()


def test_a_folder_that_is_removed_under_a_run_takes_nothing_with_it(
    machine: Machines, url: Any, tmp_path: Path
) -> None:
    one = machine("a")
    one.open()
    write(tmp_path / "a", "metrics.jsonl")
    one.sync()
    remove(tmp_path / "a")
    with pytest.raises(UserError, match="was removed"):
        one.sync()
    assert names(url) == ["metrics.jsonl"]


def test_what_ended_a_run_is_told_rather_than_that_the_last_upload_failed(
    url: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(error: Exception | None) -> None:
        with RunDirectory(url) as directory:
            directory.finish("annotate")
            monkeypatch.setattr(module, "put", _refuse)
            if error is not None:
                raise error

    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())
    assert "cannot be reached (no route)" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(UserError, match="no route"):
        run(None)
