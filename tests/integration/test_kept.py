"""Results that stay in the object store: what they survive, and that none is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

from lmcot.actors.base import ActorBase
from lmcot.actors.fleet import Fleet
from lmcot.actors.kept import Kept, Split, fetch
from lmcot.actors.news import wait_for_news
from lmcot.config import ActorsSettings, RoleSettings
from lmcot.errors import UserError

pytestmark = pytest.mark.e2e

SIZE = 200_000
"""Bytes of a value that Ray does not keep beside its reference."""


class Maker(ActorBase):
    """Makes values, and passes on what it is given."""

    def setup(self) -> str:
        return ""

    def make(self, unit: int) -> Split[int]:
        return Split(10 * unit, (bytes([unit]) * SIZE, bytes([unit])))

    def sizes(self, unit: list[Kept[bytes]]) -> list[int | None]:
        return [None if one is None else len(one) for one in fetch(unit)]

    def refuse(self, unit: int) -> Split[int]:
        raise UserError(f"no {unit}")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1, resources={"worker": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


Fleets = tuple[Fleet[Maker], Fleet[Maker]]
"""On the worker node, and on the driver's."""


@pytest.fixture
def fleets(cluster: Cluster) -> Iterator[Fleets]:
    worker = RoleSettings(count=1, cpus=0.1, resources={"worker": 1})
    here = RoleSettings(count=1, cpus=0.1)
    with (
        Fleet("maker", Maker, worker, ActorsSettings(), arguments={}) as away,
        Fleet("taker", Maker, here, ActorsSettings(), arguments={}) as taker,
    ):
        away.wait_ready()
        taker.wait_ready()
        yield away, taker


def made(fleet: Fleet[Maker], units: list[int]) -> dict[str, tuple[int, tuple[Kept[Any], ...]]]:
    """What a fleet makes of some units."""
    found: dict[str, tuple[int, tuple[Kept[Any], ...]]] = {}
    for unit in units:
        fleet.submit_split(
            Maker.make, str(unit), unit, lambda key, told, kept: found.update({key: (told, kept)}),
            kept=2,
        )  # fmt: skip
    while len(found) < len(units):
        fleet.turn()
        wait_for_news(fleet)
    return found


def turn_until_lost(fleet: Fleet[Maker]) -> None:
    """Raises what the fleet raises."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        fleet.turn()
        wait_for_news(fleet)


def stored() -> int:
    """Bytes in the object stores."""
    return sum(
        node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
        .store_stats.object_store_bytes_used
        for node in ray.nodes() if node["Alive"]
    )  # fmt: skip


def test_a_value_outlives_its_actor(fleets: Fleets) -> None:
    """[29] And is dropped from the store once nobody refers to it."""
    away, taker = fleets
    before = stored()
    found = made(away, [1, 2])
    assert {key: told for key, (told, _) in found.items()} == {"1": 10, "2": 20}
    assert stored() - before > 2 * SIZE, "they are in the node's store"
    kept = [one for _, values in found.values() for one in values]

    away.submit_split(Maker.refuse, "no", 7, print, kept=2)
    with pytest.raises(UserError, match="no 7"):
        turn_until_lost(away)

    ray.kill(away.handles[0])
    time.sleep(1)
    assert taker.map(Maker.sizes, [kept]) == [[SIZE, 1, SIZE, 1]]

    again = made(taker, [3])["3"][1]
    del found, kept
    deadline = time.monotonic() + 60
    while stored() - before > 1.5 * SIZE:
        assert time.monotonic() < deadline, "what nobody refers to stays in the store"
        time.sleep(0.2)
    assert taker.map(Maker.sizes, [list(again)]) == [[SIZE, 1]]


def test_a_value_is_lost_with_its_node(cluster: Cluster, fleets: Fleets) -> None:
    """[29] Small values are beside their references, and are not."""
    away, taker = fleets
    kept = made(away, [1])["1"][1]
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    assert taker.map(Maker.sizes, [list(kept)]) == [[None, 1]]
    assert [one is None for one in fetch(kept)] == [True, False]
