"""The resource plan: what is short, which settings would fix it, and how it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lmcot.actors.resources.packing import Node
from lmcot.actors.resources.plan import Published, make_plan
from lmcot.config import Config, RoleSettings, parse_config
from lmcot.run.roles import (
    annotate_roles,
    distill_roles,
    evaluate_roles,
    published_weights,
    refine_roles,
)

GIB = 2**30


def role(count: int = 1, cpus: float = 0.0, gpus: float = 0.0, **others: Any) -> RoleSettings:
    return RoleSettings(count=count, cpus=cpus, gpus=gpus, **others)


def nodes(*each: dict[str, float]) -> list[Node]:
    return [Node(f"node {number}", has) for number, has in enumerate(each)]


CASES: dict[str, tuple[dict[str, RoleSettings], list[Node], str, list[str]]] = {
    "CPUs short": (
        {"rollout": role(8, 0.5), "reward": role(2, 0.25)},
        nodes({"CPU": 4.0}),
        "CPU: 4.5 needed, 4 there",
        [
            "actors.rollout.count 7 instead of 8",
            "actors.rollout.cpus 0.43 instead of 0.5",
        ],
    ),
    "GPUs short": (
        {"frozen": role(1, 1, 1), "learner": role(1, 1, 2)},
        nodes({"CPU": 4.0, "GPU": 2.0}),
        "GPU: 3 needed, 2 there",
        ["actors.learner.gpus 1 instead of 2", "actors.frozen.gpus 0 instead of 1"],
    ),
    "GPUs short, of ranks that cannot share one": (
        {"learner": role(4, 1, 1)},
        nodes({"CPU": 4.0, "GPU": 2.0}),
        "GPU: 4 needed, 2 there",
        ["actors.learner.count 2 instead of 4", "actors.learner.gpus 0 instead of 1"],
    ),
    "custom resource short": (
        {"frozen": role(3, 1, resources={"tag": 1})},
        nodes({"CPU": 4.0, "tag": 2.0}, {"CPU": 4.0}),
        "tag: 3 needed, 2 there",
        [
            "actors.frozen.count 2 instead of 3",
            "actors.frozen.resources.tag 0.66 instead of 1",
        ],
    ),
    "custom resource unknown": (
        {"frozen": role(1, 1, resources={"tag": 1})},
        nodes({"CPU": 4.0}),
        "tag: 1 needed, 0 there",
        [],
    ),
    "no node is large enough": (
        {"learner": role(1, 8, 1)},
        nodes({"CPU": 6.0, "GPU": 1.0}, {"CPU": 6.0}),
        "no node has 8 CPUs and 1 GPU for one learner actor",
        ["actors.learner.cpus 6 instead of 8"],
    ),
    "in pieces": (
        {"rollout": role(3, 3)},
        nodes({"CPU": 5.0}, {"CPU": 5.0}),
        "the nodes hold 2 of the 3 rollout actors with 3 CPUs each",
        [
            "actors.rollout.cpus 2.5 instead of 3",
            "actors.rollout.count 2 instead of 3",
        ],
    ),
    "a share is of one GPU": (
        {"frozen": role(3, 1, 0.6)},
        nodes({"CPU": 4.0, "GPU": 2.0}),
        "the nodes hold 2 of the 3 frozen actors with 1 CPU and 0.6 GPUs each",
        ["actors.frozen.gpus 0.5 instead of 0.6", "actors.frozen.count 2 instead of 3"],
    ),
    "not together": (
        {"rollout": role(2, 2), "learner": role(1, 4)},
        nodes({"CPU": 5.0}, {"CPU": 3.0}),
        "rollout and learner actors fit on the nodes by themselves, but not together",
        [
            "actors.rollout.cpus 1.5 instead of 2",
            "actors.learner.cpus 3 instead of 4",
            "actors.rollout.count 1 instead of 2",
        ],
    ),
    "too few nodes to be apart": (
        {"learner": role(3, 1, placement="STRICT_SPREAD")},
        nodes({"CPU": 4.0}, {"CPU": 0.5}),
        "STRICT_SPREAD wants 3 nodes that have 1 CPU for one learner actor, 1 has",
        [
            "actors.learner.placement SPREAD instead of STRICT_SPREAD",
            "actors.learner.count 1 instead of 3",
        ],
    ),
    "too small a node to be together": (
        {"learner": role(4, 2, placement="STRICT_PACK")},
        nodes({"CPU": 4.0}, {"CPU": 4.0}),
        "no node holds more than 2 of the 4 learner actors with 2 CPUs each, which STRICT_PACK "
        "keeps together",
        [
            "actors.learner.placement PACK instead of STRICT_PACK",
            "actors.learner.count 2 instead of 4",
            "actors.learner.cpus 1 instead of 2",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_short_and_what_would_mend_it(name: str) -> None:
    roles, there, short, remedies = CASES[name]
    plan = make_plan("refine", roles, there)
    assert plan.short == short
    assert [str(remedy) for remedy in plan.remedies] == remedies
    for remedy in plan.remedies:
        assert make_plan("refine", remedy.applied(roles), there).short == ""


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_takes_no_more_than_it_must(name: str) -> None:
    """The next larger value does not fit."""
    roles, there, *_ = CASES[name]
    for remedy in make_plan("refine", roles, there).remedies:
        ranks = remedy.field == "gpus" and roles[remedy.role].count > 1 and remedy.role == "learner"
        if remedy.field == "placement" or ranks:
            continue
        step = 1 if remedy.field == "count" else 0.01
        larger = replace(remedy, value=round(remedy.value + step, 2))
        if larger.value < larger.instead:
            assert make_plan("refine", larger.applied(roles), there).short


def test_the_refusal_is_one_sentence() -> None:
    roles, there, *_ = CASES["CPUs short"]
    assert make_plan("refine", roles, there).refusal == (
        "the actors of 'refine' do not fit on the cluster (CPU: 4.5 needed, 4 there): use "
        "actors.rollout.count 7 instead of 8 or actors.rollout.cpus 0.43 instead of 0.5, or add "
        "nodes"
    )
    impossible = {"rollout": role(1, 2), "reward": role(1, 2), "learner": role(1, 2)}
    assert make_plan("refine", impossible, nodes({"CPU": 1.0})).refusal == (
        "the actors of 'refine' do not fit on the cluster (CPU: 6 needed, 1 there): lower several "
        "settings of actors.rollout, actors.reward and actors.learner, or add nodes"
    )


def test_a_plan_that_fits_reads_as_tables_and_as_one_line() -> None:
    roles = {"rollout": role(2, 1, 0.5), "reward": role(1), "learner": role(1, 4, 1)}
    store = {"object_store_memory": 2.0 * GIB}
    there = nodes({"CPU": 4.0, "GPU": 1.0, **store}, {"CPU": 8.0, "GPU": 1.0, **store})
    plan = make_plan("refine", roles, there, Published(GIB // 2, 3))
    assert plan.notices == []
    assert plan.summary == (
        "refine: actors (2 rollout, 1 reward, 1 learner) take 6.001 of 12 CPU, 2 of 2 GPU on "
        "2 nodes"
    )
    assert plan.describe() == (
        "refine\n"
        "  role     count  each takes          all take          strategy\n"
        "  rollout  2      1 CPU and 0.5 GPUs  2 CPUs and 1 GPU  PACK\n"
        "  reward   1      0.001 CPUs          0.001 CPUs        PACK\n"
        "  learner  1      4 CPUs and 1 GPU    4 CPUs and 1 GPU  PACK\n"
        "\n"
        "  node    CPU  GPU  object store\n"
        "  node 0  4    1    2.00 GiB\n"
        "  node 1  8    1    2.00 GiB\n"
        "\n"
        "fits"
    )


def test_versions_that_the_smallest_object_store_does_not_hold_are_noticed() -> None:
    there = nodes(
        {"CPU": 1.0, "object_store_memory": 4.0 * GIB},
        {"CPU": 1.0, "object_store_memory": 1.0 * GIB},
    )
    roles = {"rollout": role(1, 1)}
    plan = make_plan("refine", roles, there, Published(GIB // 2, 3))
    assert plan.short == ""
    assert plan.notices == [
        "refine: 3 versions of the weights take 1.50 GiB, but the object store of node 1 has "
        "1.00 GiB: raise actors.object_store_gib (on a joined cluster Ray's "
        "--object-store-memory), or lower refine.max_staleness"
    ]
    assert make_plan("refine", roles, there, Published(GIB // 2, 2)).notices == []
    [notice] = make_plan("refine", roles, there, Published(GIB, 2)).notices
    assert "max_staleness" not in notice


def test_what_was_not_found_out_is_no_refusal() -> None:
    sizes = [round(1.7 + number / 100, 2) for number in range(8)]
    roles = {f"role {number}": role(7, cpus) for number, cpus in enumerate(sizes)}
    plan = make_plan("refine", roles, nodes(*[{"CPU": 5.2}] * 19))
    assert plan.short == ""
    [notice] = plan.notices
    assert "was not found out" in notice


def config(**changes: Any) -> Config:
    return parse_config(
        {
            "data": {
                "train": {"kind": "counting", "examples": 2},
                "validation": {"kind": "counting", "examples": 2},
            },
            "policy": {"source": "random:counting-llama", "dtype": "float32"},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "teacher": {"kind": "frozen"},
            **changes,
        }
    )


def test_the_roles_of_each_stage() -> None:
    settings = config()
    assert list(annotate_roles(settings)) == ["frozen"]
    assert list(distill_roles(settings)) == ["learner"]
    assert list(refine_roles(settings)) == ["rollout", "reward", "learner", "frozen"]
    assert list(evaluate_roles(settings, ["standard", "cot"])) == ["frozen"]
    assert list(evaluate_roles(settings, ["cot", "small_alone"])) == ["frozen", "rollout"]
    toy = config(rewards={"kind": "increasing", "length": 4})
    assert list(refine_roles(toy)) == ["rollout", "reward", "learner"]


def test_the_weights_that_travel() -> None:
    from lmcot.models.sources import count_parameters, load_model

    model, _ = load_model("random:counting-llama", "float32")
    settings = config(refine={"max_staleness": 3})
    assert published_weights(settings) == Published(4 * count_parameters(model), 5)
    halved = {"source": "random:counting-llama", "dtype": "bfloat16"}
    assert published_weights(config(policy=halved)) == Published(2 * count_parameters(model), 2)
    assert published_weights(config(policy={**halved, "lora": {}})) is None
