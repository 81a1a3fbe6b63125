"""Where actors land on a cluster of several nodes, all on this machine; `lmcot plan` there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lmcot.actors.resources.cluster import check_plan, find_plan
from lmcot.actors.resources.placement import Placement
from lmcot.cli import main
from lmcot.config import ActorsSettings, RoleSettings
from lmcot.errors import UserError

TOY = Path(__file__).parents[2] / "configs" / "toy.yaml"
LIMIT_S = 20.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two nodes of two CPUs; GPUs that are none, and a resource of its own on the second."""
    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, num_gpus=2, resources={"tag": 2})
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True)
def all_is_free(cluster: None) -> Iterator[None]:
    """Each test gives back what it took; not at once, for Ray ends actors by and by."""
    yield
    deadline = time.monotonic() + LIMIT_S
    while ray.available_resources().get("CPU") != 4 or ray.available_resources().get("GPU") != 2:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def actor_class() -> Any:
    """Made in a function, so that Ray sends the class itself, not this module's name."""

    class Asked:
        def ask(self, function: Any, *arguments: Any) -> Any:
            return function(*arguments)

        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    return ray.remote(Asked)


def landed(placement: Placement, count: int) -> list[str]:
    """The nodes of a role's actors."""
    placement.wait(LIMIT_S)
    actors = [actor_class().options(**placement.options(n)).remote() for n in range(count)]
    nodes: list[str] = ray.get([actor.node.remote() for actor in actors], timeout=LIMIT_S)
    placement.remove()
    return nodes


def node_with(resource: str) -> str:
    [found] = [node["NodeID"] for node in ray.nodes() if resource in node["Resources"]]
    return str(found)


def groups() -> list[Any]:
    return [one for one in placement_group_table().values() if one["state"] != "REMOVED"]


def test_actors_land_on_the_node_that_offers_what_they_ask_for() -> None:
    role = RoleSettings(count=2, cpus=0.5, resources={"tag": 1})
    assert landed(Placement("frozen", role), 2) == [node_with("tag")] * 2


def test_actors_that_are_to_be_apart_are() -> None:
    role = RoleSettings(count=2, cpus=0.5, placement="STRICT_SPREAD")
    assert len(set(landed(Placement("learner", role), 2))) == 2


def test_actors_that_take_nothing_are_placed_too() -> None:
    role = RoleSettings(count=3, cpus=0, placement="STRICT_PACK")
    placement = Placement("reward", role)
    assert placement.options(2)["num_cpus"] == 0
    assert len(landed(placement, 3)) == 3


def test_a_guest_shares_the_gpu_of_its_host() -> None:
    """Pair by pair; and the guests' room is not theirs to give back."""
    host = RoleSettings(count=2, cpus=0.2, gpus=0.5)
    guest = RoleSettings(count=2, cpus=0.3, gpus=0.4)
    room = Placement("rollout", host, guest=guest)
    beside = room.for_guest("learner", guest)
    for one in (room, beside):
        one.wait(LIMIT_S)
    hosts, guests = (
        [actor_class().options(**one.options(n)).remote() for n in range(2)]
        for one in (room, beside)
    )
    asked = [actor.ask.remote(ray.get_gpu_ids) for actor in (*hosts, *guests)]
    first, second, *theirs = ray.get(asked, timeout=LIMIT_S)
    assert first != second
    assert theirs == [first, second]
    beside.remove()
    assert ray.get(hosts[0].ask.remote(ray.get_gpu_ids), timeout=LIMIT_S) == first
    room.remove()


def test_without_room_it_says_who_waits_for_what_and_leaves_nothing() -> None:
    role = RoleSettings(
        count=3, cpus=0.5, gpus=0.5, resources={"tag": 0.5}, placement="STRICT_SPREAD"
    )
    placement = Placement("rollout", role)
    with pytest.raises(TimeoutError) as told:
        placement.wait(0.5)
    assert str(told.value) == (
        "waited 0 s for the placement of 3 rollout actor(s) with 0.5 CPUs, 0.5 GPUs and 0.5 tag "
        "each (strategy STRICT_SPREAD): check that the nodes have them free, or change "
        "actors.rollout"
    )
    placement.remove()
    placement.remove()
    assert groups() == []


def place_inside(role: RoleSettings) -> tuple[bool, str, int]:
    """What happens to an actor of a process that is itself in a placement group."""
    before = len(groups())
    placement = Placement("rollout", role)
    options = placement.options(0)
    placement.wait(LIMIT_S)
    actor = actor_class().options(**options).remote()
    landed = ray.get(actor.ask.remote(lambda: ray.util.get_current_placement_group().id.hex()))
    made = len(groups()) - before
    ray.kill(actor)
    placement.remove()
    return "scheduling_strategy" in options, str(landed), made


def plan_inside(role: RoleSettings) -> tuple[str, list[str]]:
    plan = find_plan("refine", {"rollout": role})
    return plan.short, [node.name for node in plan.nodes]


@pytest.mark.parametrize("captures", [True, False])
def test_in_a_trial_of_ray_tune_its_placement_group_takes_the_actors_in(captures: bool) -> None:
    """Only if that group captures what its processes start, as Tune's do."""
    group = placement_group([{"CPU": 1}, {"CPU": 0.5}, {"CPU": 0.5}], strategy="STRICT_PACK")
    assert group.wait(LIMIT_S)
    strategy = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=0, placement_group_capture_child_tasks=captures
    )
    trial = actor_class().options(num_cpus=1, scheduling_strategy=strategy).remote()
    role = RoleSettings(cpus=0.5)
    own, where, made = ray.get(trial.ask.remote(place_inside, role), timeout=2 * LIMIT_S)
    assert own is not captures
    assert (where == group.id.hex()) is captures
    assert made == (0 if captures else 1)

    many = role.model_copy(update={"count": 3})  # the trial's own CPU is not theirs
    short, names = ray.get(trial.ask.remote(plan_inside, many), timeout=LIMIT_S)
    assert short == ("CPU: 1.5 needed, 1 there" if captures else "")
    assert len(names) == (1 if captures else 2)
    ray.kill(trial)
    remove_placement_group(group)


def test_the_plan_names_all_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(TOY), "actors.rollout.resources={tag: 0.5}"]) == 0
    told = capsys.readouterr()
    nodes = [node["NodeID"][:6] for node in ray.nodes()]
    assert all(f"this machine ({node})" in told.out for node in nodes)
    assert "rollout  2      0.5 CPUs and 0.5 tag  1 CPU and 1 tag  PACK" in told.out
    assert told.out.endswith("\n\nfits\n")
    assert told.err == ""


def test_a_plan_that_does_not_fit_ends_with_the_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", "--config", str(TOY), "actors.rollout.cpus=3"]
    assert main(command) == 2
    told = capsys.readouterr()
    short = "CPU: 6.75 needed, 4 there"
    assert f"does not fit ({short}): use" in told.out
    assert told.err == (
        f"lmcot: the actors of 'refine' do not fit on the cluster ({short}): use "
        "actors.rollout.cpus 1.5 instead of 3, or add nodes\n"
    )
    assert main([*command, "actors.autoscaling=true"]) == 0


def test_a_stage_says_its_plan_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    roles = {"learner": RoleSettings(count=3, cpus=1, placement="STRICT_SPREAD")}
    short = "STRICT_SPREAD wants 3 nodes that have 1 CPU for one learner actor, 2 have"
    with pytest.raises(UserError) as refused:
        check_plan("distill", roles, ActorsSettings())
    assert short in str(refused.value)
    line = "distill: actors (3 learner) take 3 of 4 CPU on 2 nodes\n"
    assert capsys.readouterr().err == line
    check_plan("distill", roles, ActorsSettings(autoscaling=True))
    waits = f"distill: short of room ({short}); actors wait for nodes to join\n"
    assert capsys.readouterr().err == line + waits


def test_the_doctor_asks_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    """By the cluster's address: what it says is of each node, and they agree."""
    address = ray.get_runtime_context().gcs_address
    main(["doctor", "--config", str(TOY), f"actors.address={address}"])
    said = capsys.readouterr().out
    pythons = [line for line in said.splitlines() if ": Python 3." in line]
    assert len(pythons) == 2
    assert len({line.split(": ")[0] for line in pythons}) == 2, "each by its own name"
    assert "differs between nodes" not in said
