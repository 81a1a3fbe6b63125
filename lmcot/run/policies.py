"""The policies that a run directory holds, and the commands that make those that it lacks."""

from __future__ import annotations

from lmcot.config import Config
from lmcot.config.stages import BASE, stage_of_policy
from lmcot.errors import UserError
from lmcot.run.directory import RunDirectory


def check_policy(
    directory: RunDirectory, config: Config, policy: str, purpose: str, setting: str
) -> None:
    """Checks that a run directory holds the policy that something starts from.

    Args:
        purpose: what the policy is for, as the end of "there is no distilled model".
        setting: the setting that names the policy.

    Raises:
        UserError: naming all commands that are to be run first.
    """
    stages = _stages_before(directory, config, policy)
    if stages:
        commands = " and ".join(f"'lmcot {stage}'" for stage in stages)
        raise UserError(
            f"there is no {policy} model in '{directory.home}' {purpose}: run {commands} on this "
            f"run directory first, or set {setting} to '{BASE}'"
        )


def _stages_before(directory: RunDirectory, config: Config, policy: str) -> list[str]:
    """The stages that are left to do until there is a policy, in their order."""
    if policy == BASE:
        return []
    stage = stage_of_policy(policy).name
    if directory.finished(stage) is not None:
        return []
    start = getattr(getattr(config, stage), "start_from", BASE)
    return [*_stages_before(directory, config, start), stage]
