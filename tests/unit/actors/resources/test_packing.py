"""Whether actors fit at the same time: hand-made cases, and against trying everything."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest

from lmcot.actors.resources.packing import Node, amounts, capacity, fits
from lmcot.config import RoleSettings


def role(count: int = 1, cpus: float = 0.0, gpus: float = 0.0, **others: Any) -> RoleSettings:
    return RoleSettings(count=count, cpus=cpus, gpus=gpus, **others)


def nodes(*each: dict[str, float]) -> list[Node]:
    return [Node(f"node {number}", has) for number, has in enumerate(each)]


CPU4 = {"CPU": 4.0}
PACKED = "STRICT_PACK"
APART = "STRICT_SPREAD"


@pytest.mark.parametrize(
    ("roles", "there", "expected"),
    [
        ([role(4, 1)], [CPU4], True),
        ([role(5, 1)], [CPU4], False),
        ([role(2, 3)], [CPU4, CPU4], True),
        ([role(3, 3)], [CPU4, CPU4], False),  # 8 of 9 CPUs, and in pieces
        ([role(4, 3), role(4, 1)], [CPU4] * 4, True),
        ([role(4, 3), role(2, 2)], [CPU4] * 4, False),
        ([role(10, 0.1)], [{"CPU": 1.0}], True),  # ten times 0.1 is 1 in Ray's arithmetic
        ([role(3, 0.3333)], [{"CPU": 1.0}], True),
        ([role(3, 0.3334)], [{"CPU": 1.0}], False),
        ([role(3)], [{"CPU": 0.003}], True),  # an actor that takes nothing needs a place
        ([role(3)], [{"CPU": 0.002}], False),
        ([role(1)], [], False),
        ([role(2, gpus=0.6)], [{"CPU": 1.0, "GPU": 2.0}], True),
        ([role(3, gpus=0.6)], [{"CPU": 1.0, "GPU": 2.0}], False),  # 1.8 of 2, but one GPU each
        ([role(2, gpus=0.5), role(1, gpus=1)], [{"CPU": 1.0, "GPU": 2.0}], True),
        ([role(1, gpus=2)], [{"GPU": 1.0}] * 2, False),
        ([role(1, gpus=2), role(2, gpus=1)], [{"GPU": 2.0}] * 2, True),
        ([role(2, gpus=0.6), role(2, gpus=0.4), role(1, gpus=1)], [{"GPU": 3.0}], True),
        ([role(2, 1, resources={"tag": 1})], [CPU4, {"CPU": 1.0, "tag": 2.0}], False),
        ([role(2, 1, resources={"tag": 1})], [CPU4, {"CPU": 2.0, "tag": 2.0}], True),
        ([role(4, 1, placement=PACKED)], [CPU4, {"CPU": 3.0}], True),
        ([role(4, 1, placement=PACKED)], [{"CPU": 3.0}] * 4, False),
        (
            [role(2, 1, placement=PACKED), role(2, 1.5, placement=PACKED)],
            [{"CPU": 3.0}, {"CPU": 2.0}],
            True,
        ),
        (
            [role(2, 1, placement=PACKED), role(2, 1, placement=PACKED)],
            [{"CPU": 3.0}, {"CPU": 1.0}],
            False,
        ),
        ([role(2, 1, placement=APART)], [CPU4], False),
        ([role(2, 1, placement=APART)], [CPU4, CPU4], True),
        ([role(2, 1, placement=APART), role(2, 1, placement=APART)], [{"CPU": 2.0}] * 2, True),
        ([role(2, 1, placement=APART), role(1, 3)], [CPU4, {"CPU": 1.0}], True),
        ([role(2, 1, placement=APART), role(1, 4)], [CPU4, {"CPU": 1.0}], False),
        ([role(2, 1, placement="SPREAD")], [CPU4], True),  # apart only if it can be
        # A small actor must not take the CPUs beside the GPU.
        ([role(4, 1), role(1, 4, 1)], [{"CPU": 4.0, "GPU": 1.0}, CPU4], True),
        # Largest first, each where least is left, fails here: the search mends it.
        ([role(2, 4), role(3, 3), role(1, 2)], [{"CPU": 10.0}, {"CPU": 9.0}], True),
    ],
)
def test_cases_made_by_hand(
    roles: list[RoleSettings], there: list[dict[str, float]], expected: bool
) -> None:
    assert fits(roles, nodes(*there)) is expected
    assert fits(roles[::-1], nodes(*there[::-1])) is expected


def test_capacity_is_of_the_scarcest_and_of_single_gpus() -> None:
    [node] = nodes({"CPU": 4.0, "GPU": 2.0, "tag": 3.0})
    assert capacity(role(9, 1), node) == 4
    assert capacity(role(9, 0.1), node) == 40
    assert capacity(role(9, 0.1, 0.6), node) == 2
    assert capacity(role(9, 0.1, 0.5), node) == 4
    assert capacity(role(9, 0.1, 2), node) == 1
    assert capacity(role(9, 0.5, resources={"tag": 1.5}), node) == 2
    assert capacity(role(9, resources={"other": 1}), node) == 0


def test_a_search_that_takes_too_long_says_so() -> None:
    """Many different sizes that all but fill the nodes; a large cluster still takes no time."""
    roles = [role(7, 1.7 + i / 100) for i in range(8)]
    assert fits(roles, nodes(*[{"CPU": 5.2}] * 19), effort=50) is None
    assert fits([role(400, 1), role(100, 4, 1)], nodes(*[{"CPU": 8.0, "GPU": 1.0}] * 100)) is True


def test_amounts_read_as_english() -> None:
    assert amounts({"CPU": 1.0}) == "1 CPU"
    assert amounts({"CPU": 0.5, "GPU": 2.0}) == "0.5 CPUs and 2 GPUs"
    assert amounts({"CPU": 8, "GPU": 1, "tag": 2}) == "8 CPUs, 1 GPU and 2 tag"


def by_trying_everything(roles: list[RoleSettings], there: list[Node]) -> bool:
    """Each actor on each node, and on each of its GPUs."""
    actors = [one for one in roles for _ in range(one.count)]
    places = [(n, g) for n, node in enumerate(there) for g in range(int(node.resources["GPU"]))]
    for choice in product(places, repeat=len(actors)):
        cpus = [round(node.resources["CPU"] * 100) for node in there]
        gpus = dict.fromkeys(places, 100)
        on: dict[int, list[int]] = {}
        for actor, place in zip(actors, choice, strict=True):
            cpus[place[0]] -= round(actor.cpus * 100)
            gpus[place] -= round(actor.gpus * 100)
            on.setdefault(id(actor), []).append(place[0])
        strict = all(
            len(set(on[id(one)])) == {"STRICT_PACK": 1, "STRICT_SPREAD": one.count}[one.placement]
            for one in roles
            if one.placement.startswith("STRICT")
        )
        if strict and min(cpus) >= 0 and min(gpus.values()) >= 0:
            return True
    return False


def test_the_answer_is_that_of_trying_everything() -> None:
    draw = random.Random(0)
    answers = []
    for _ in range(300):
        roles = [
            role(
                draw.randint(1, 2),
                draw.choice([0.25, 0.5, 1, 1.5]),
                draw.choice([0.2, 0.3, 0.4, 0.5, 0.6, 1]),
                placement=draw.choice(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
            )
            for _ in range(draw.randint(1, 3))
        ]
        there = nodes(
            *(
                {"CPU": draw.choice([1.0, 1.5, 2.0, 3.0]), "GPU": draw.choice([1.0, 2.0])}
                for _ in range(draw.randint(1, 2))
            )
        )
        answers.append(by_trying_everything(roles, there))
        assert fits(roles, there) is answers[-1], (roles, there)
    assert 50 < sum(answers) < 250
