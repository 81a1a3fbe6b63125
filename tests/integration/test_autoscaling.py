"""cluster.yaml's node types on Ray's own autoscaler: they join as roles ask, and are given back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = "ray.head.default"
IN_NAMESPACES = [
    "unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--net",
    "sh", "-c", 'ip link set lo up && exec "$@"', "sh",
]  # fmt: skip
"""What runs a command with processes and ports of its own."""


def missing() -> str:
    """What keeps this machine from giving namespaces; empty if nothing does."""
    if absent := [name for name in ("unshare", "ip") if shutil.which(name) is None]:
        return f"needs {' and '.join(absent)}"
    tried = subprocess.run([*IN_NAMESPACES, "true"], capture_output=True, check=False)
    return "needs to make namespaces, which root may" if tried.returncode else ""


WHY_NOT = missing()
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)]


@pytest.fixture
def ray_home() -> Iterator[Path]:
    """Where Ray finds the running cluster, and puts sockets: its path must be short."""
    with tempfile.TemporaryDirectory(prefix="lmcot-ray-") as folder:
        yield Path(folder)


def test_nodes_join_as_the_roles_ask_for_them_and_are_given_back(
    ray_home: Path, tmp_path: Path
) -> None:
    """Two rollout actors take a node each; a reward node holds both reward actors."""
    done = subprocess.run(
        [*IN_NAMESPACES, sys.executable, str(ROOT / "tests/support/autoscaled.py"), str(tmp_path)],
        cwd=ROOT,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(ray_home),
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-test-alone",
        },
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] == [""], "there is the head, and there never was another node"
    workers = ["frozen", "learner", "reward", "rollout", "rollout"]
    placed = [
        ["FrozenActor", "frozen"], ["LearnerActor", "learner"], ["RewardActor", "reward"],
        ["RewardActor", "reward"], ["RolloutActor", "rollout"], ["RolloutActor", "rollout"],
    ]  # fmt: skip
    step = {"nodes": sorted([HEAD, *workers]), "actors": placed}
    assert found["steps"] == [step, step]
    head, *others = found["after"]
    assert head == ""
    assert len(others) == len(workers), "no other nodes came meanwhile"
    assert all(reason.startswith("Termination of node that's idle") for reason in others), others
