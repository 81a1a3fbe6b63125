"""A run whose nodes Ray's own autoscaler starts and ends; prints as JSON what came and went.

    python tests/support/autoscaled.py FOLDER

Run by tests/integration/test_autoscaling.py, in namespaces of its own: the ports are Ray's usual
ones, and what is left at the end ends with the namespaces. The cluster is that of cluster.yaml, but
a node is some processes here, and a GPU a mere number; the roles are placed as docs/cluster.md
says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.state import actors
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
)
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.sdk import get_cluster_status

from lmcot.config import Config, load_config
from lmcot.run.context import open_run
from lmcot.training.refine import refine
from tests.support.documented import placement

ROOT = Path(__file__).parents[2]
IDLE_S = 5.0
_ADDRESS = "127.0.0.1:6379"
_LIMIT_S = 120.0
_PROVIDER = {
    # By its class: Ray's wheel lacks the defaults that go with the name `fake_multinode`.
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "head_node_id": FAKE_HEAD_NODE_ID,
    "launch_multiple": True,
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
}
_SETTINGS = (
    "refine.start_from=base",
    "policy.max_new_tokens=16",
    f"actors.start_timeout_s={_LIMIT_S}",
    "actors.rollout.count=2",
    "actors.reward.count=2",
    "actors.frozen.count=1",
)


def start_head(folder: Path) -> None:
    """What `ray up cluster.yaml` starts on the head, with another provider."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8")))
    types = config["available_node_types"]
    # The provider has a name of its own for the head's type.
    types[FAKE_HEAD_NODE_TYPE] = head = types.pop(config["head_node_type"])
    config |= {
        "provider": _PROVIDER,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "idle_timeout_minutes": IDLE_S / 60,
    }
    file = folder / "autoscaled.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    resources = dict(head["resources"])
    subprocess.run(
        [Path(sys.executable).with_name("ray"), "start", "--head", "--include-dashboard=false",
         f"--num-cpus={resources.pop('CPU')}", f"--resources={json.dumps(resources)}",
         f"--autoscaling-config={file}"],
        env={
            **os.environ, "RAY_enable_autoscaler_v2": "1", "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        },
        stdout=sys.stderr, check=True, timeout=_LIMIT_S,
    )  # fmt: skip


def settings() -> Config:
    """Those of the small T5s, with the documented placement."""
    documented = [f"actors.{name}={json.dumps(value)}" for name, value in placement().items()]
    return load_config(ROOT / "configs" / "smoke_t5.yaml", [*documented, *_SETTINGS])


def nodes() -> dict[str, str]:
    """Types of the nodes that there are or will be, by their ids, as `ray status` has it."""
    status = get_cluster_status(_ADDRESS)
    there = [*status.active_nodes, *status.idle_nodes, *status.pending_nodes]
    coming = {f"launch {n}": one for n, one in enumerate(status.pending_launches)}
    return {one.node_id or one.instance_id: one.ray_node_type_name for one in there} | {
        name: one.ray_node_type_name for name, one in coming.items()
    }


def run(folder: Path) -> list[dict[str, Any]]:
    """Refines; at each step, the types of all nodes, and of the nodes that each actor is on."""
    seen = []

    def look(step: int, metrics: dict[str, float]) -> None:
        there = nodes()
        alive = [one for one in actors().values() if one["State"] == "ALIVE"]
        placed = [[one["ActorClassName"], there[one["Address"]["NodeID"]]] for one in alive]
        seen.append({"nodes": sorted(there.values()), "actors": sorted(placed)})

    with open_run(settings(), folder / "run") as opened:
        refine(opened, on_step=look)
    return seen


def wait_for_the_head_alone() -> None:
    """Until the autoscaler knows it, or has ended all other nodes."""
    deadline = time.monotonic() + _LIMIT_S
    while list((there := nodes()).values()) != [FAKE_HEAD_NODE_TYPE]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_LIMIT_S:.0f} s for the head to be alone, among {there}")
        time.sleep(0.2)


def ends() -> list[str]:
    """Why each node that there ever was is gone; empty of one that is not."""
    ray.init(address=_ADDRESS, log_to_driver=False)
    reasons = [one["DeathReasonMessage"] for one in ray.nodes()]
    ray.shutdown()
    return sorted(reasons)


def main() -> None:
    """Before, during and after a run."""
    folder = Path(sys.argv[1])
    start_head(folder)
    wait_for_the_head_alone()
    before = ends()
    steps = run(folder)
    wait_for_the_head_alone()
    print(json.dumps({"before": before, "steps": steps, "after": ends()}))


main()
