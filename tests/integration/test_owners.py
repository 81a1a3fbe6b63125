"""Two drivers and one run in a bucket of moto's S3, whose connection fails in many ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lmcot import ownership, storage
from lmcot.errors import UserError
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.ownership import MARKS, OwnedElsewhere
from lmcot.records import RunState
from lmcot.run import ownership as lease
from lmcot.run.directory import RunDirectory
from lmcot.storage import added_to, on_disk, place, versions_of
from tests.integration.cloud import cloud, needs_cloud, settings
from tests.support.faulty_store import FaultyStore, Request, faulty

pytestmark = [pytest.mark.e2e, needs_cloud]

RACES = int(os.environ.get("LMCOT_RACES", "10"))

_RACER = """
import sys, time
from pathlib import Path
from lmcot.errors import UserError
from lmcot.run import ownership
from lmcot.storage import place
ownership.BEAT_S = ownership._LOOK_EVERY_S = 0.2
print("ready", flush=True)
for line in sys.stdin:
    url, start = line.split()
    mine = ownership.Ownership(place(url), Path(sys.argv[1]))
    time.sleep(max(0.0, float(start) - time.time()))
    try:
        mine.take(mine.wait()[0])
        print("owner", flush=True)
        sys.stdin.readline()  # lives until the other has given up
    except UserError as error:
        print("refused:", error, flush=True)
        sys.stdin.readline()
    mine.stop()
"""
"""Takes runs, each at a given moment."""

_DRIVER = """
import json, sys, time
from pathlib import Path
from lmcot.errors import UserError
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.records import RunState
from lmcot.run import mirror, ownership
from lmcot.run.directory import RunDirectory
from lmcot.storage import added_to, place
ownership.BEAT_S = mirror.SYNC_S = 0.5
ownership.LEASE_S = 3.0
try:
    with RunDirectory(place(sys.argv[1])) as directory:
        store = CheckpointStore(directory.checkpoints, claim=directory.claim)
        found = store.latest()
        step = found[0].step if found else 0
        print(f"begins after {step}", flush=True)
        metrics = directory.path / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        metrics.write_text("".join(lines[:step]))
        while step < int(sys.argv[2]):
            directory.check_owner()
            step += 1
            with metrics.open("a") as log:
                log.write(json.dumps({"step": step, "by": sys.argv[3]}) + "\\n")
            state = RunState("refine", step=step)
            folder = store.begin(state)
            with added_to(folder, before=directory.claim.check_persistently) as local:
                (local / "engine").mkdir()
                (local / "engine" / "share").write_bytes(sys.argv[3].encode() * 50_000)
            directory.sync()
            store.finish(state, folder, {})
            print(f"step {step}", flush=True)
            time.sleep(0.2)
    print("done", flush=True)
except UserError as error:
    print(f"refused: {error}", flush=True)
"""
"""A driver and its learners in one process: steps, each with its checkpoint."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with cloud() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def store(upstream: str) -> Iterator[FaultyStore]:
    """The bucket behind a proxy, for this process and what it starts."""
    with faulty(upstream) as proxy, pytest.MonkeyPatch.context() as environment:
        for name, value in settings(proxy.address).items():
            environment.setenv(name, value)
        environment.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own; s3fs and lmcot have others
        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("owners")
        yield proxy
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def no_fault(store: FaultyStore) -> Iterator[None]:
    yield
    store.fault = lambda request: ""


def start(program: str, *arguments: str, cache: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, **({"LMCOT_CACHE": str(cache)} if cache else {})}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(line.strip())
        if line.startswith(wanted):
            return found
    raise AssertionError(f"it ended before '{wanted}': {found}")


def test_of_two_drivers_that_start_in_the_same_moment_one_owns_the_run(store: FaultyStore) -> None:
    racers = [start(_RACER, name) for name in ("/a", "/b")]

    def tell(text: str) -> None:
        for one in racers:
            assert one.stdin is not None
            print(text, file=one.stdin, flush=True)

    try:
        for one in racers:
            read_until(one, "ready")
        for number in range(RACES):
            tell(f"s3://owners/race-{number} {time.time() + 0.05}")
            answers = [one.stdout.readline().strip() for one in racers if one.stdout is not None]
            tell("on")
            assert answers.count("owner") == 1, answers
            assert any("has just taken" in one or "is writing to" in one for one in answers)
            assert len(versions_of(place(f"s3://owners/race-{number}") / MARKS)) == 1
    finally:
        for one in racers:
            one.kill()
            one.wait()


def test_a_driver_that_was_stopped_beyond_its_lease_ends_and_touches_nothing(
    store: FaultyStore, tmp_path: Path
) -> None:
    """Stopped while its learners upload a checkpoint, and continued after the other's first."""
    url = place("s3://owners/stopped")
    first = start(_DRIVER, str(url), "1000", "a", cache=tmp_path / "a")
    other = None
    try:
        read_until(first, "step 2")
        uploads = threading.Event()

        def slow_upload(request: Request) -> str:
            if request.writes("/engine/share"):
                uploads.set()
                return "slow"
            return ""

        store.fault = slow_upload
        assert uploads.wait(30)
        first.send_signal(signal.SIGSTOP)
        store.fault = lambda request: ""
        other = start(_DRIVER, str(url), "8", "b", cache=tmp_path / "b")
        told = read_until(other, "step 5")
        assert told[0].startswith("begins after ")
        begun = int(told[0].split()[-1])
        first.send_signal(signal.SIGCONT)
        said = read_until(first, "refused")[-1]
        assert "has taken over the run" in said
        assert "writes nothing more" in said
        assert first.wait(30) == 0
        read_until(other, "done")
    finally:
        for one in (first, other):
            if one is not None:
                one.send_signal(signal.SIGCONT)
                one.kill()
                one.wait()
    _one_history(url, begun, 8)


def _one_history(url: Any, begun: int, steps: int) -> None:
    """Checks that a run's files are those of the last owner, from where it began."""
    lines = [json.loads(line) for line in (url / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, steps + 1)]
    assert [line["by"] for line in lines if line["step"] > begun] == ["b"] * (steps - begun)
    found = CheckpointStore(url / "checkpoints").latest()
    assert found is not None
    assert found[0].step == steps
    with on_disk(found[1]) as local:
        assert set((local / "engine" / "share").read_text()) == {"b"}


class _Faults:
    """Lets the first requests of a kind fail, then none."""

    def __init__(self, kind: str, name: str, times: int) -> None:
        self._kind, self._name, self._left = kind, name, times

    def __call__(self, request: Request) -> str:
        if self._left and request.writes(self._name):
            self._left -= 1
            return self._kind
        return ""


@pytest.mark.parametrize(
    ("kind", "name", "times"),
    [("cut", "/engine/share", 8), ("500", "checkpoints", 8), ("503", "metrics", 12),
     ("deaf", MARKS, 2), ("slow", "", 3)],
)  # fmt: skip
def test_a_store_that_fails_for_a_moment_costs_only_time(
    kind: str, name: str, times: int, store: FaultyStore, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(storage, "_LONGEST_PAUSE_S", 1.0)
    url = place(f"s3://owners/{kind}")
    store.met.clear()
    store.fault = _Faults(kind, name, times)
    _steps(url, tmp_path, monkeypatch, 2)
    assert kind in store.met
    found = CheckpointStore(url / "checkpoints").latest()
    assert found is not None
    assert found[0].step == 2
    assert (url / "metrics.jsonl").read_text() == "1\n2\n"
    assert len(versions_of(url / MARKS)) == 1, "one owner, also where an answer was lost"


def test_a_connection_that_is_lost_for_longer_than_the_lease_leaves_one_run(
    store: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else asked for the run meanwhile: its owner keeps it."""
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    monkeypatch.setattr(storage, "_LONGEST_PAUSE_S", 1.0)
    url = place("s3://owners/lost")

    def lose(step: int) -> None:
        if step == 2:
            store.fault = lambda request: "lost"
            threading.Timer(6, lambda: setattr(store, "fault", lambda request: "")).start()

    _steps(url, tmp_path, monkeypatch, 3, before=lose)
    found = CheckpointStore(url / "checkpoints").latest()
    assert found is not None
    assert found[0].step == 3
    assert (url / "metrics.jsonl").read_text() == "1\n2\n3\n"


def test_a_store_that_stays_away_ends_the_run_in_one_sentence(
    store: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 1.0)
    url = place("s3://owners/away")

    def lose(step: int) -> None:
        if step == 2:
            store.fault = lambda request: "500"

    with pytest.raises(UserError, match=r"cannot be reached \(.*\): check the address"):
        _steps(url, tmp_path, monkeypatch, 3, before=lose)
    store.fault = lambda request: ""
    found = CheckpointStore(url / "checkpoints").latest()
    assert found is not None
    assert found[0].step == 1, "half a checkpoint is none"
    _steps(url, tmp_path, monkeypatch, 3)
    found = CheckpointStore(url / "checkpoints").latest()
    assert found is not None
    assert found[0].step == 3


def _steps(
    url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, before: Any = None
) -> None:
    """What a driver and its learners write of some steps."""
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path))
    with RunDirectory(url) as directory:
        assert directory.claim is not None
        kept = CheckpointStore(directory.checkpoints, claim=directory.claim)
        found = kept.latest()
        for step in range(found[0].step + 1 if found else 1, last + 1):
            if before is not None:
                before(step)
            log = directory.path / "metrics.jsonl"
            lines = [*(log.read_text().split() if log.exists() else [])[: step - 1], str(step)]
            log.write_text("\n".join(lines) + "\n")
            state = RunState("refine", step=step)
            folder = kept.begin(state)
            with added_to(folder, before=directory.claim.check_persistently) as local:
                (local / "engine").mkdir()
                (local / "engine" / "share").write_bytes(b"x" * 100_000)
            directory.sync()
            kept.finish(state, folder, {})


def test_a_second_driver_is_refused_while_the_first_lives(
    store: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(ownership, "_PAUSE_S", 0.1)
    url = place("s3://owners/living")
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path / "a"))
    with RunDirectory(url) as directory:
        monkeypatch.setenv("LMCOT_CACHE", str(tmp_path / "b"))
        with pytest.raises(OwnedElsewhere, match="is writing to the run"), RunDirectory(url):
            pass
        directory.sync()


def test_of_a_file_that_grows_the_store_gets_only_what_is_new(
    store: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path))
    url = place("s3://owners/grows")
    with RunDirectory(url) as directory:
        log = directory.path / "metrics.jsonl"
        log.write_bytes(b"x" * 6 * 2**20)
        directory.sync()
        before = store.received
        for _ in range(2):
            with log.open("ab") as file:
                file.write(b"y" * 1000)
            directory.sync()
        assert store.received - before < 2**20
    assert (url / "metrics.jsonl").read_bytes() == b"x" * 6 * 2**20 + b"y" * 2000
