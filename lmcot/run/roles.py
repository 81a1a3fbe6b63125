"""The actors that each stage needs."""

from __future__ import annotations

from collections.abc import Sequence

from lmcot.actors.resources.plan import Published, Roles
from lmcot.config import Config, FrozenTeacher, Row
from lmcot.config.rows import find_row
from lmcot.models.sources import parameters_of, resolve_dtype


def annotate_roles(config: Config) -> Roles:
    """The frozen LM if it is the teacher; other teachers need no actors."""
    return {"frozen": config.actors.frozen} if isinstance(config.teacher, FrozenTeacher) else {}


def distill_roles(config: Config) -> Roles:
    """The learners only."""
    return {"learner": config.actors.learner}


def refine_roles(config: Config) -> Roles:
    """All actors, except the frozen LM for the toy's rewards."""
    actors = config.actors
    roles: Roles = {"rollout": actors.rollout, "reward": actors.reward, "learner": actors.learner}
    return {**roles, "frozen": actors.frozen} if config.rewards.kind == "guidance" else roles


def judging_roles(config: Config) -> Roles:
    """The actors that sample and judge."""
    return {name: role for name, role in refine_roles(config).items() if name != "learner"}


def evaluate_roles(config: Config, rows: Sequence[Row] | None) -> Roles:
    """The frozen LM, and the small LM if a row needs its rationales (unset rows do)."""
    roles: Roles = {"frozen": config.actors.frozen}
    guided = rows is None or any(find_row(name).policy for name in rows)
    return {**roles, "rollout": config.actors.rollout} if guided else roles


def aspect_roles(config: Config) -> Roles:
    """The actors that judge rationales by aspect, once the small LM's actors are gone."""
    return {"frozen": config.actors.frozen, "reward": config.actors.reward}


def published_weights(config: Config) -> Published | None:
    """The weights that refinement puts into the object stores; None if only adapters are sent.

    The version that learns, the one before it, and those that staleness keeps in use.

    Raises:
        UserError: if there is no model at ``policy.source``.
    """
    if config.policy.lora is not None:
        return None
    dtype = resolve_dtype(config.policy.dtype)
    nbytes = parameters_of(config.policy.source) * dtype.itemsize
    return Published(nbytes, config.refine.max_staleness + 2)
