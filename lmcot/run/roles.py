"""Which actors each stage takes."""

from __future__ import annotations

from collections.abc import Sequence

from lmcot.actors.resources.plan import Published, Roles
from lmcot.config import Config, Row
from lmcot.config.rows import find_row
from lmcot.models.sources import parameters_of, resolve_dtype


def annotate_roles(config: Config) -> Roles:
    """Where the frozen LM is the teacher; nothing is started for other teachers."""
    return {"frozen": config.actors.frozen}


def distill_roles(config: Config) -> Roles:
    """The learners alone."""
    return {"learner": config.actors.learner}


def refine_roles(config: Config) -> Roles:
    """All actors; the toy's rewards ask no frozen LM."""
    actors = config.actors
    roles: Roles = {"rollout": actors.rollout, "reward": actors.reward, "learner": actors.learner}
    return {**roles, "frozen": actors.frozen} if config.rewards.kind == "guidance" else roles


def evaluate_roles(config: Config, rows: Sequence[Row] | None) -> Roles:
    """The frozen LM, and the small one if a row needs its rationales (unset rows do)."""
    roles: Roles = {"frozen": config.actors.frozen}
    guided = rows is None or any(find_row(name).policy for name in rows)
    return {**roles, "rollout": config.actors.rollout} if guided else roles


def aspect_roles(config: Config) -> Roles:
    """Those that judge rationales by aspect, once the small LM's actors are gone."""
    return {"frozen": config.actors.frozen, "reward": config.actors.reward}


def published_weights(config: Config) -> Published | None:
    """What refinement puts into the object stores; None where only adapters travel.

    The version that learns, the one before it, and those that staleness keeps in use.

    Raises:
        UserError: if there is no model at ``policy.source``.
    """
    if config.policy.lora is not None:
        return None
    dtype = resolve_dtype(config.policy.dtype)
    nbytes = parameters_of(config.policy.source) * dtype.itemsize
    return Published(nbytes, config.refine.max_staleness + 2)
