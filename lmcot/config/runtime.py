"""Settings of actors and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmcot.config.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)

_FINEST = 0.0001
"""Ray's smallest share of a resource."""


def check_amounts(gpus: float, resources: Mapping[str, float], takes: Mapping[str, float]) -> None:
    """Checks what one actor reserves.

    Raises:
        ValueError: if Ray would not grant it.
    """
    if gpus > 1 and gpus % 1:
        raise ValueError(
            f"gpus is {gpus:g}, but an actor has a share of one GPU or several whole ones: set it "
            f"to {gpus // 1:g} or {gpus // 1 + 1:g}"
        )
    for name in ("CPU", "GPU", "memory", "object_store_memory"):
        if name in resources:
            raise ValueError(
                f"resources holds '{name}', which is Ray's own: CPUs and GPUs are set by 'cpus' "
                "and 'gpus', memory cannot be reserved"
            )
    for name, amount in takes.items():
        if amount < _FINEST:
            raise ValueError(f"{amount:g} {name} is less than Ray's smallest share, {_FINEST}")


class RoleSettings(Settings):
    """A fleet of actors of one role, and what each of them reserves."""

    count: PositiveInt = 1
    """Actors in the fleet."""
    cpus: NonNegativeFloat = 1.0
    """Ray CPUs reserved for one actor."""
    gpus: NonNegativeFloat = 0.0
    """Ray GPUs reserved for one actor."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources reserved for one actor, by name: it is placed on nodes that offer
    them."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy: together on as few nodes as possible, or apart."""

    @property
    def takes(self) -> dict[str, float]:
        """What is reserved for one actor, by Ray's names; what is 0 is left out."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in amounts.items() if amount}

    @model_validator(mode="after")
    def _amounts_that_ray_grants(self) -> RoleSettings:
        check_amounts(self.gpus, self.resources, self.takes)
        return self


class ComputingRole(RoleSettings):
    """A fleet whose actors compute themselves."""

    threads: PositiveInt = 1
    """CPU threads that one actor computes with; fixed, since the exact results depend on it."""


class ActorsSettings(Settings):
    """The Ray side: fleets, work units and time limits.

    By default one actor of each role fits on two CPUs: the roles take turns at computing.
    """

    address: str | None = None
    """A running Ray cluster (``auto`` or ``ray://...``); unset: RAY_ADDRESS, else a local one."""
    object_store_gib: PositiveFloat | None = None
    """Memory of Ray's object store, which holds the weights of some versions, on a cluster that is
    started on this machine; unset: what fits into its memory, at most 4. An existing cluster has
    its own."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """How far actors give way to other programs of this machine, on a cluster that is started here
    (Ray's own default is 15): at 0 they share the cores equally with a background compile, at 15 it
    takes nearly all of a core that both want. It is added to the niceness of the lmcot command.
    RAY_worker_niceness in the environment holds instead where it is set. A cluster that is joined
    has its own."""
    autoscaling: bool = False
    """Whether nodes may join the cluster as actors need them: a lack of room is then not an
    error."""
    rollout: ComputingRole = ComputingRole(cpus=0.5)
    """Actors that sample rationales from the small policy."""
    reward: RoleSettings = RoleSettings(cpus=0.25)
    """Actors that judge rationales."""
    frozen: ComputingRole = ComputingRole(cpus=0.5)
    """Actors that run, or call, the frozen LM."""
    learner: ComputingRole = ComputingRole(cpus=0.5)
    """Actors that train: one for each rank of the DeepSpeed group."""
    colocate: bool = False
    """Whether a rollout actor and a learner share each GPU in refinement, as a pair: the memory of
    the one that samples is freed while the other learns. ``rollout.gpus`` and ``learner.gpus`` are
    then shares of one GPU, and there are as many of both."""
    prompts_per_unit: PositiveInt = 4
    """Questions in one work unit: a fixed micro-batch, whichever actor runs it."""
    max_attempts: PositiveInt = 3
    """How often a unit is tried before the run stops."""
    unit_timeout_s: PositiveFloat = 600.0
    """An actor that takes longer over one unit is restarted and the unit done elsewhere."""
    max_learner_restarts: NonNegativeInt = 3
    """How often the learners are started again from the last checkpoint when one of them dies."""
    start_timeout_s: PositiveFloat = 300.0
    """Time limit for actors to start and load their models."""
    verify_weights: bool = False
    """Whether to compare, for each version, the checksum of a rollout actor's weights with the
    learner's."""


class CheckpointSettings(Settings):
    """How often the state is saved, and how many checkpoints are kept."""

    every: PositiveInt = 10
    """Steps between two checkpoints."""
    keep: PositiveInt = 2
    """Number of checkpoints that are kept for each stage, the newest."""
