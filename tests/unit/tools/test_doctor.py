"""What `lmcot doctor` finds, on machines made up, and on this one."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from lmcot.cli import main
from lmcot.config import load_config
from lmcot.tools import doctor as doctors
from lmcot.tools.doctor import GIB, Facts, examine, examine_nodes, local_facts

CONFIGS = Path(__file__).parents[3] / "configs"
WELL = Facts(
    name="node",
    python=(3, 11, 7),
    versions={"lmcot": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"},
    temp="/tmp",
    temp_free=50 * GIB,
    shm_free=8 * GIB,
    open_files=65536,
    gpus=0,
    compiler="/usr/bin/c++",
)


def complaints(facts: Facts, **actors: float) -> list[str]:
    overrides = [f"actors.rollout.{key}={value}" for key, value in actors.items()]
    config = load_config(str(CONFIGS / "toy.yaml"), overrides)
    return [one.text for one in examine(facts, config) if one.verdict != "ok"]


def test_a_machine_that_is_well() -> None:
    assert complaints(WELL) == []
    assert complaints(replace(WELL, gpus=2), gpus=1) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"python": (3, 10, 2)}, "Python 3.10.2: lmcot needs 3.11"),
        ({"unmet": ("torch>=2.8",)}, "install torch>=2.8"),
        ({"versions": {"lmcot": ""}}, "lmcot missing: install lmcot"),
        ({"temp_free": GIB}, "1.0 GiB free in /tmp.*RAY_TMPDIR"),
        ({"shm_free": 64 * 2**20}, "0.1 GiB of shared memory.*--shm-size"),
        ({"open_files": 1024}, "open-file limit 1024.*ulimit -n"),
        ({"compiler": ""}, r"compiler missing.*g\+\+"),
        ({"memory": GIB // 2}, "0.5 GiB of memory available: too little for Ray"),
        ({"troubles": ("HOME is /nowhere",)}, "HOME is /nowhere"),
        ({"notices": ("Ray's files go to '/tmp'",)}, "Ray's files go to '/tmp'"),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(wrong: dict[str, object], said: str) -> None:
    import re

    (text,) = complaints(replace(WELL, **wrong))  # type: ignore[arg-type]
    assert text.startswith("node: ")
    assert re.search(said, text)


def test_gpus_that_are_asked_for() -> None:
    (text,) = complaints(WELL, gpus=1)
    assert "0 GPUs: the settings ask for GPUs" in text


@pytest.mark.parametrize(
    ("memory", "shared", "verdicts"),
    [(8, 8, []), (2.2, 8, ["fix"]), (8, 1, ["note", "note"])],
)
def test_an_object_store_that_is_asked_for(
    memory: float, shared: int, verdicts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(str(CONFIGS / "toy.yaml"), ["actors.object_store_gib=2"])
    facts = replace(WELL, memory=int(memory * GIB), shm_free=shared * GIB)
    assert [one.verdict for one in examine(facts, config) if one.verdict != "ok"] == verdicts


def doctored(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **environment: str
) -> str:
    """What it says with these variables; Ray is not started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctors, "_started", lambda config: [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = main(["doctor"])
    said = capsys.readouterr().out
    assert code == (2 if "fix   " in said else 0)
    count = said.count("fix   ")
    assert said.splitlines()[-1] == (
        "all is well" if code == 0 else f"{count} problem{'s' * (count != 1)} to fix"
    )
    return said


def test_a_long_folder_for_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = doctored(capsys, monkeypatch, RAY_TMPDIR=str(tmp_path / ("x" * 90)))
    assert "(from RAY_TMPDIR) has a path of more than 40 bytes" in said
    assert "note  this machine: the folder" in said


def test_a_home_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    assert "cannot be written: '" in doctored(capsys, monkeypatch, HOME=home)
    monkeypatch.delenv("LMCOT_CACHE")
    assert f"(HOME is {home}: set LMCOT_CACHE" in doctored(capsys, monkeypatch, HOME=home)


def test_a_cluster_that_is_gone_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "no-port")
    assert main(["doctor", "--run-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "fix   the cluster: the Ray cluster at 'no-port' cannot be joined" in said
    assert "free for the run directory" in said, "the others are looked at all the same"


def test_a_look_that_fails_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise OSError("no such device")

    monkeypatch.setattr(doctors, "_gpus", fail)
    said = doctored(capsys, monkeypatch)
    assert "fix   this machine cannot be checked: no such device (OSError)" in said


def test_nodes_must_agree() -> None:
    other = replace(WELL, name="other", versions={**WELL.versions, "ray": "2.59.0"})
    found = [one for one in examine_nodes([WELL, other], None) if one.verdict == "fix"]
    assert [one.text for one in found] == [
        "ray differs between nodes (node has 2.60.0, other has 2.59.0): install one"
    ]


def test_this_machine_and_what_the_settings_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert local_facts().unmet == ()
    command = ["doctor", "--config", str(CONFIGS / "quickstart.yaml"), "--run-dir"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = main([*command, str(tmp_path / "run"), f"serve.port={port}"])
    said = capsys.readouterr().out
    assert "ok    the frozen LM is there" in said
    assert "ok    Ray starts on this machine" in said
    monkeypatch.setattr(doctors, "_started", lambda config: [])
    assert f"note  127.0.0.1:{port}, where `lmcot serve` would listen, is not free" in said
    assert "free for the run directory" in said
    assert not (tmp_path / "run").exists(), "it only looks"
    assert code == (2 if "fix   " in said else 0)
    assert main([*command, "/proc/nowhere", "frozen.source=random:nobody"]) == 2
    said = capsys.readouterr().out
    assert "fix   the frozen LM: there is no model 'random:nobody'" in said
    assert "fix   the run directory /proc/nowhere cannot be written" in said
