"""Measures how long rollout actors wait for a new version of the weights.

    python -m benchmarks.broadcast [--rounds 9]

SmolLM2-135M in bfloat16 goes to four rollout actors on this machine; the time runs from when the
learner's object is stored until all four have checked and loaded it. The benchmark prints its ratio
to the minimum work: one put of the object, and four bare copies of all tensors with a CRC-32 of
their bytes, spread over the cores without loss. All times are medians, measured in turns; put, copy
and CRC run in this process while the actors are idle.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import zlib

import ray
import torch
from torch import Tensor

from benchmarks.cases import SMOLLM2
from benchmarks.timing import medians
from lmcot.actors.fleet import Fleet
from lmcot.actors.resources.cluster import ray_cluster
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.weights import Weights, pack_weights
from lmcot.config import ActorsSettings, PolicySettings, RoleSettings
from lmcot.models.sources import load_model
from lmcot.process import use_threads

ACTORS = 4
GOAL = 1.3


def _broadcast(fleet: Fleet[RolloutActor], weights: Weights) -> None:
    """Sends one version as `lmcot refine` does."""
    fleet.configure(RolloutActor.use_weights, (ray.put(weights),))


def _least_work(tensors: list[Tensor], places: list[Tensor], weights: Weights) -> None:
    """Does the minimum work of one actor."""
    zlib.crc32(weights.buffer.data)
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)


def _new_version() -> tuple[list[Tensor], Weights]:
    """Tensors that differ from the actors' initial ones, and their packed form."""
    model, _ = load_model(SMOLLM2, "bfloat16")
    named = [(name, parameter.detach().neg()) for name, parameter in model.named_parameters()]
    tensors = [tensor for _, tensor in named]
    return tensors, pack_weights(named, sum(tensor.nbytes for tensor in tensors), 1)


def measure(rounds: int) -> dict[str, float]:
    """Median seconds of ``put``, ``load`` (the minimum work of one actor) and ``broadcast``."""
    use_threads(threads=1)
    tensors, weights = _new_version()
    places = [torch.empty_like(tensor) for tensor in tensors]
    versions = itertools.count(1)
    settings = ActorsSettings()
    arguments = {
        "policy": PolicySettings(source=SMOLLM2, dtype="bfloat16"),
        "source": SMOLLM2,
        "threads": 1,
        "trains": True,
    }
    role = RoleSettings(count=ACTORS, cpus=0.25)
    with (
        ray_cluster(settings),
        Fleet("rollout", RolloutActor, role, settings, arguments=arguments) as fleet,
    ):
        fleet.wait_ready()
        taken = medians(
            {
                "put": lambda: _drop(ray.put(weights)),
                "load": lambda: _least_work(tensors, places, weights),
                "broadcast": lambda: _broadcast(
                    fleet, dataclasses.replace(weights, version=next(versions))
                ),
            },
            rounds,
        )
        if fleet.call(RolloutActor.checksum) != [weights.checksum] * ACTORS:
            raise RuntimeError("an actor holds other weights than were sent")
    return taken


def _drop(_: ray.ObjectRef) -> None:
    """Drops a reference to an object."""


def main() -> None:
    """Prints the times and their ratio to the minimum."""
    parser = argparse.ArgumentParser(description="Time of a weight broadcast.")
    parser.add_argument("--rounds", type=int, default=9)
    taken = measure(parser.parse_args().rounds)
    cores = min(len(os.sched_getaffinity(0)), ACTORS)
    least = taken["put"] + ACTORS * taken["load"] / cores
    print(
        f"a broadcast to {ACTORS} actors takes {1000 * taken['broadcast']:.0f} ms, "
        f"{taken['broadcast'] / least:.2f} times the least work (goal: at most {GOAL}): one put of "
        f"{1000 * taken['put']:.0f} ms and {ACTORS} x {1000 * taken['load']:.0f} ms "
        f"on {cores} cores"
    )


if __name__ == "__main__":
    main()
