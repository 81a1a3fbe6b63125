"""Which actors each stage takes, and whether the cluster has room for them: `lmcot plan`."""

from __future__ import annotations

from collections.abc import Sequence

from lmcot.actors.cluster import find_plan, nodes, ray_cluster
from lmcot.actors.plan import Plan, Published, Roles
from lmcot.actors.served import find_served_plan
from lmcot.config import Config, FrozenTeacher, Row
from lmcot.errors import UserError
from lmcot.models.sources import parameters_of, resolve_dtype
from lmcot.stages.rows import WITHOUT_POLICY, plain


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
    guided = rows is None or any(plain(row) not in WITHOUT_POLICY for row in rows)
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


def stage_plans(config: Config) -> list[Plan]:
    """The resource plan of each stage that `lmcot train` would run, and of `lmcot serve`.

    On the cluster as it is now.

    Raises:
        UserError: if there is no model at ``policy.source``.
    """
    plans = []
    if isinstance(config.teacher, FrozenTeacher):
        plans.append(find_plan("annotate", annotate_roles(config)))
    if config.teacher is not None:
        plans.append(find_plan("distill", distill_roles(config)))
    plans.append(find_plan("refine", refine_roles(config), published_weights(config)))
    if config.frozen is not None:
        plans.append(find_plan("evaluate", evaluate_roles(config, config.evaluate.rows)))
        plans.append(find_served_plan(config, nodes()))
    return plans


def show_plan(config: Config) -> None:
    """Prints the plan of each stage.

    Raises:
        UserError: about the first stage that does not fit, unless nodes may join.
    """
    with ray_cluster(config.actors):
        plans = stage_plans(config)
    print("\n\n".join(plan.describe() for plan in plans))
    refusals = [plan.refusal for plan in plans if plan.short]
    if refusals and not config.actors.autoscaling:
        raise UserError(refusals[0])
