"""Several Ray nodes on one machine: ranks on two of them form one group, and a node may vanish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from lmcot.actors.fleet import Fleet
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.weights import checksum, pack_weights
from lmcot.config import ActorsSettings, PolicySettings, PromptSettings, RoleSettings
from lmcot.models.sources import load_model
from tests.integration.runtime_cases import (
    Killer,
    assert_counted_once,
    metrics,
    run,
    samples,
    told,
)

pytestmark = pytest.mark.e2e

STEPS = 10
SETTINGS = (
    f"refine.steps={STEPS}",
    "learner.zero_stage=2",
    "actors.rollout.count=2",
    "actors.rollout.placement=SPREAD",
    "actors.rollout.resources={worker: 1}",
    "actors.learner.count=2",
    "actors.learner.placement=SPREAD",
    "actors.learner.resources={worker: 1}",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without work of its own to do, and two workers."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=2, resources={"worker": 4})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_weights_travel_once_to_a_node_and_go_when_they_are_old(cluster: Cluster) -> None:
    """[27] Three actors of one node fetch one copy of each version; none is left behind."""
    policy = PolicySettings(source="random:llama", dtype="float32", max_new_tokens=2)
    model, _ = load_model(policy.source, "float32")
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    role = RoleSettings(count=3, cpus=0.1, resources={"worker": 1}, placement="STRICT_PACK")
    arguments = {
        "policy": policy, "source": policy.source, "prompts": PromptSettings(), "threads": 1,
        "verify": True,
    }  # fmt: skip
    with Fleet("rollout", RolloutActor, role, ActorsSettings(), arguments=arguments) as fleet:
        fleet.wait_ready()
        node = ray.get(
            fleet.handles[0].apply.remote(lambda _: ray.get_runtime_context().get_node_id())
        )
        before = stored(cluster, node)
        for version in range(1, 11):
            with torch.no_grad():
                next(model.parameters()).add_(1.0)
            weights = ray.put(pack_weights(model.named_parameters(), nbytes, version))
            fleet.call(RolloutActor.use_weights, (weights,))
            assert fleet.call(RolloutActor.checksum) == [checksum(model)] * 3
        assert stored(cluster, node)[0] - before[0] == 10, "one copy of each version"
        del weights
        deadline = time.monotonic() + 30
        while stored(cluster, node)[1] > before[1]:
            assert time.monotonic() < deadline, "old versions stay in the object store"
            time.sleep(0.2)


def stored(cluster: Cluster, node: str) -> tuple[int, int]:
    """Objects that a node's store has ever held, and the bytes that it holds now."""
    (found,) = (one for one in ray.nodes() if one["NodeID"] == node)
    stats = node_stats(found["NodeManagerAddress"], found["NodeManagerPort"]).store_stats
    return stats.cumulative_created_objects, stats.object_store_bytes_used


def nodes_of(resource: str, actors: int) -> list[set[str]]:
    """Of each role that takes a custom resource, with so many actors: the nodes that it is on."""
    return [
        set(group["bundles_to_node_id"].values())
        for group in placement_group_table().values()
        if group["state"] == "CREATED"
        and len(group["bundles"]) == actors
        and all(resource in bundle for bundle in group["bundles"].values())
    ]


def test_a_node_that_vanishes_takes_a_learner_and_a_rollout_actor_with_it(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ranks start again on what is left; the run ends as the undisturbed one."""
    placed: list[Any] = []

    def look(step: int, _: dict[str, float]) -> None:
        if step == 1:
            placed.extend(nodes_of("worker", 2))

    run(tmp_path / "undisturbed", *SETTINGS, on_step=look)
    assert [len(nodes) for nodes in placed] == [2, 2], "learners and rollout actors, on two nodes"
    assert told(tmp_path / "undisturbed", "health/learner_restarts")[-1] == 0

    doomed = cluster.worker_nodes.copy().pop()
    killer = Killer({6: lambda: cluster.remove_node(doomed, allow_graceful=False)}, seed=1)
    run(tmp_path / "disturbed", *SETTINGS, on_step=killer.on_step)
    killer.finish()
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    assert_counted_once(tmp_path / "disturbed", STEPS)
    assert told(tmp_path / "disturbed", "health/learner_restarts")[-1] == 1
    assert metrics(tmp_path / "disturbed") == metrics(tmp_path / "undisturbed")
    assert samples(tmp_path / "disturbed", STEPS) == samples(tmp_path / "undisturbed", STEPS)
    said = capsys.readouterr().err
    assert "the learners are back after " in said
    assert "a learner was lost" in said or "was lost during" in said
    print(f"\nrecovery: {told(tmp_path / 'disturbed', 'seconds/recovery')[-1]:.1f} s")
