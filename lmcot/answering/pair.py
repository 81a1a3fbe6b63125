"""A trained pair, as a run directory holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lmcot import run_files
from lmcot.config import Config, DrawnDemonstrations, GivenDemonstrations, read_config
from lmcot.config.stages import most_trained
from lmcot.data.demonstrations import (
    DEMONSTRATIONS_KEY,
    demonstrations_digest,
    read_given,
)
from lmcot.errors import UserError
from lmcot.files import read_object
from lmcot.frozen.needs import cost_in_words
from lmcot.frozen.templates import open_templates
from lmcot.monitor.progress import say
from lmcot.rewards.first_check import check_frozen
from lmcot.storage import reaching

if TYPE_CHECKING:
    from lmcot.storage import Place


_PUT_BACK = "put the file back from a copy"


@dataclass(frozen=True, slots=True)
class Pair:
    """A trained pair, as a run directory holds it."""

    config: Config
    source: str
    """Model source of the small LM."""
    version: str
    """The policy and its run, as people read them."""


def open_pair(run_dir: Place, policy: str | None = None, overrides: Sequence[str] = ()) -> Pair:
    """The most trained policy of a run, with the run's settings.

    Args:
        policy: one of `lmcot.config.stages.POLICIES` instead, such as ``rejection``.
        overrides: ``key.sub=value``, in place of the run's.

    Raises:
        UserError: if that is not a run directory, or has no such policy, or no frozen LM.
    """
    file = run_dir / run_files.CONFIG
    with reaching(run_dir):
        there = file.is_file()
        run_files.check_format(run_dir)
        found = policy or most_trained(run_dir)
        if found and not run_files.holds_model(run_dir / found):
            found = None
    if not there:
        raise UserError(f"'{run_dir}' is not a run directory: it has no config.yaml")
    config = _with_demonstrations(read_config(str(file), list(overrides)), run_dir)
    if config.frozen is None:
        raise UserError(f"the run in '{run_dir}' has no frozen LM configured, so it cannot answer")
    if policy == "base":
        return Pair(config, config.policy.source, f"base of {run_dir.name}")
    if found is None:
        raise UserError(
            f"'{run_dir}' holds no {policy or 'trained'} policy: train one with 'lmcot train', or "
            "ask for the policy 'base'"
        )
    return Pair(config, str(run_dir / found), f"{found} of {run_dir.name}")


def _with_demonstrations(config: Config, run_dir: Place) -> Config:
    """The settings with the demonstrations that the run has drawn, which need no data any more."""
    wanted = config.prompts.demonstrations
    if not isinstance(wanted, DrawnDemonstrations):
        return config
    if wanted != read_config(str(run_dir / run_files.CONFIG)).prompts.demonstrations:
        raise UserError(
            "prompts.demonstrations cannot be drawn in another way than the run's: leave the "
            "override out, or set a number"
        )
    given = read_given(run_dir / run_files.DEMONSTRATIONS, wanted)
    _check_unchanged(given, run_dir)
    return config.showing(given)


def _check_unchanged(given: GivenDemonstrations, run_dir: Place) -> None:
    """Checks that the demonstrations are those that the run's stages were shown.

    Raises:
        UserError: naming the file that has changed.
    """
    with reaching(run_dir):
        stages = read_object(run_dir / run_files.INPUTS, _PUT_BACK)
    for stage, recorded in stages.items():
        if recorded.get(DEMONSTRATIONS_KEY) not in (None, demonstrations_digest(given)):
            raise UserError(
                f"the demonstrations in '{run_dir / run_files.DEMONSTRATIONS}' are not those that "
                f"the stage '{stage}' was shown: {_PUT_BACK}, or override prompts.demonstrations "
                "with a number"
            )


def learned(pair: Pair) -> Pair:
    """The pair, with settings that its endpoint accepts.

    The endpoint is asked once; parameters that it refuses are renamed or left out. A local model is
    not asked, only looked for.

    Raises:
        UserError: if the endpoint does not answer, or there is no such model, or vLLM is not there
            or does not run the small LM.
    """
    if pair.config.serve.small.vllm is not None:
        from lmcot.models.generation.vllm_start import check_vllm  # which imports torch

        check_vllm("serve.small.vllm is set", "leave it unset", "the small LM", pair.source)
    templates = open_templates(pair.config.prompts)
    checked = check_frozen(pair.config, templates, "serve")
    for notice in checked.notices:
        say(notice)
    if checked.usage.sent:
        say(f"the frozen LM's endpoint was asked first: {cost_in_words(checked.usage)}")
    return replace(pair, config=checked.config)
