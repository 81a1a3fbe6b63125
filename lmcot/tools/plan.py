"""`lmcot plan` shows whether the cluster has room for each stage."""

from __future__ import annotations

import json

from lmcot.actors.resources.cluster import find_plan, nodes, ray_cluster
from lmcot.actors.resources.plan import Plan
from lmcot.actors.resources.served import find_served_plan
from lmcot.config import Config
from lmcot.errors import UserError
from lmcot.training.train import wanted_stages


def stage_plans(config: Config) -> list[Plan]:
    """The resource plan, on the present cluster, of `lmcot train`'s stages and `lmcot serve`.

    On the cluster as it is now.

    Raises:
        UserError: if there is no model at ``policy.source``.
    """
    plans = [
        find_plan(stage.name, roles, stage.published(config))
        for stage in wanted_stages(config)
        if (roles := stage.roles(config))
    ]
    if config.frozen is not None:
        plans.append(find_served_plan(config, nodes()))
    return plans


def show_plan(config: Config, *, as_json: bool = False) -> None:
    """Prints the plan of each stage.

    Args:
        as_json: a line of JSON in place of tables.

    Raises:
        UserError: if a stage does not fit, about the first such stage, unless nodes may join.
    """
    with ray_cluster(config.actors):
        plans = stage_plans(config)
    if as_json:
        print(json.dumps([plan.as_json() for plan in plans]))
    else:
        print("\n\n".join(plan.describe() for plan in plans))
    refusals = [plan.refusal for plan in plans if plan.short]
    if refusals and not config.actors.autoscaling:
        raise UserError(refusals[0])
