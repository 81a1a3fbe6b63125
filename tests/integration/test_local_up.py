"""`ray up` of one's own machines for real, on hosts made of namespaces."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.integration.cloud import TOOLS, needs_cloud
from tests.support import hosts

SUPPORT = Path(__file__).parents[1] / "support"
MISSING = hosts.missing()
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


def seen_by(script: str, *arguments: str, log: Path) -> dict[str, Any]:
    """What a script printed that ran in namespaces of its own; nothing of it is left."""
    extensions = str(Path(_get_build_directory("any", verbose=False)).parent)
    with log.open("w") as file:
        done = subprocess.run(
            hosts.into_laptop(SUPPORT / script, *arguments, extensions),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True,
            timeout=1500, check=False,
        )  # fmt: skip
    assert done.returncode == 0, log.read_text(encoding="utf-8")[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def json_in(text: str) -> list[dict[str, Any]]:
    """The list that `ray list --format json` printed, among what ssh said."""
    (line,) = [one for one in text.splitlines() if one.startswith("[{")]
    found: list[dict[str, Any]] = json.loads(line)
    return found


@needs_cloud
def test_ray_up_of_ones_own_machines(tmp_path: Path) -> None:
    """From `ray up` to `ray down`, with a job that is stopped and goes on, and the service."""
    moto = str(TOOLS / "bin" / "moto_server")
    found = seen_by("local_up.py", moto, log=tmp_path / "log")

    assert "2 local.cluster.node" in found["status"]
    for resource in ("learner", "rollout", "frozen", "reward", "driver"):
        assert f"{resource}\n" in found["status"].replace("\r", "")
    address = {one["node_id"]: one["node_ip"] for one in json_in(found["nodes"])}
    assert sorted(address.values()) == ["10.77.0.1", "10.77.0.2"]
    for host in address.values():
        assert f"{host} (" in found["doctor"], "each node was examined"

    ran = {
        (one["class_name"], address[one["node_id"]])
        for one in json_in(found["actors"])
        if one["state"] == "ALIVE"
    }
    head, worker = "10.77.0.1", "10.77.0.2"
    assert ran >= {
        ("RewardActor", head), ("LearnerActor", worker), ("RolloutActor", worker),
        ("FrozenActor", worker),
    }  # fmt: skip
    assert not ran & {("LearnerActor", head), ("RolloutActor", head), ("RewardActor", worker)}

    reached = found["reached"]
    assert "ending at the next safe point, with a checkpoint" in found["stopped"]
    assert "interrupted; rerun the same command to resume" in found["stopped"]
    assert f"refine: resuming after step {reached}" in found["again"]
    assert "evaluate: the report is in s3://lmcot/mine/report.md" in found["again"]
    assert "Job 'second' succeeded" in found["again"]
    assert found["done"] == reached + 2
    assert "| `control_empty` |" in found["evaluated"], "a job that evaluates alone"
    assert "Job 'third' succeeded" in found["evaluated"]

    assert found["answer"]["votes"]
    assert {"reward/mean", "kl"} <= set(found["tags"])
    assert found["seconds_to_end"] < 150
    for left in found["left"]:
        names = {line.split()[0] for line in left.splitlines()}
        assert names == {"sshd", "ps"}, left
