"""`lmcot plan` shows whether the cluster has room for each stage."""

from __future__ import annotations

import json
from dataclasses import asdict

from lmcot.actors.resources.cluster import find_plan, nodes, ray_cluster
from lmcot.actors.resources.plan import Plan
from lmcot.actors.resources.served import find_served_plan
from lmcot.config import Config
from lmcot.data.loaders import load_examples
from lmcot.data.tasks import open_task
from lmcot.errors import UserError
from lmcot.run.estimate import Estimate, estimate
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


def estimate_of(config: Config) -> Estimate | None:
    """What the run is expected to take and to cost, if the settings have an ``estimate`` section.

    Raises:
        UserError: if the questions, or the earlier run, cannot be read.
    """
    if config.estimate is None:
        return None
    data, task = config.data, open_task(config.task)
    train, validation = (
        load_examples(
            source, limit=limit, on_bad=data.on_bad_record, task=task,
            require_context=config.requires_context,
        )
        for source, limit in (
            (data.train, data.max_train), (data.validation, data.max_validation),
        )
    )  # fmt: skip
    return estimate(config, len(train.examples), len(validation.examples))


def show_plan(config: Config, *, as_json: bool = False) -> None:
    """Prints the plan of each stage, and what the run is expected to take.

    Args:
        as_json: a line of JSON in place of tables.

    Raises:
        UserError: if a stage does not fit, about the first such stage, unless nodes may join.
    """
    expected = estimate_of(config)
    with ray_cluster(config.actors):
        plans = stage_plans(config)
    if as_json:
        parts = [plan.as_json() for plan in plans]
        print(json.dumps([*parts, *([{"estimate": asdict(expected)}] if expected else [])]))
    else:
        told = [plan.describe() for plan in plans]
        print("\n\n".join([*told, *([expected.describe()] if expected else [])]))
    refusals = [plan.refusal for plan in plans if plan.short]
    if refusals and not config.actors.autoscaling:
        raise UserError(refusals[0])
