"""What questions lack that teachers, aspects or prompts need is said before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lmcot.config import Config, FrozenTeacher, GuidanceRewards, SupportingFactsTeacher
from lmcot.errors import UserError
from lmcot.records import Example
from lmcot.rewards.aspects import NEED_PASSAGES
from lmcot.rewards.learned import load_learned

_QUOTING: Final = ("default", "base")
"""Templates that ask the small LM to quote facts of the passages."""


def check_presence(config: Config, train: Sequence[Example]) -> None:
    """Refuses training questions that lack what the settings cannot do without.

    Raises:
        UserError: naming the setting, and what the questions lack.
    """
    by_facts = isinstance(config.teacher, SupportingFactsTeacher)
    if by_facts and train and not any(one.gold_sentences() for one in train):
        raise UserError(
            "teacher.kind is 'supporting_facts', but no question of data.train has any: set it to "
            "'frozen', or to 'file' if you have rationales"
        )
    bare = sum(not one.context for one in train)
    for key in _weighted_without_passages(config) if bare else ():
        raise UserError(
            f"{key} is set, but {bare} of {len(train)} questions of data.train have no passages to "
            "measure it by: set the weight to 0, or the aspect's source to 'judge'"
        )


def what_is_left_out(config: Config, examples: Sequence[Example], kind: str) -> list[str]:
    """A sentence on each thing that goes without what the questions lack.

    Args:
        kind: what the questions are: ``data.train`` or ``data.validation``.
    """
    bare = sum(not one.context for one in examples)
    if not bare or config.rewards.kind != "guidance":
        return []
    lost = "rationales have no factuality and no share that is copied"
    told = [
        f"{kind}: no question has passages; prompts go without them, and {lost}"
        if bare == len(examples)
        else f"{kind}: {bare} of {len(examples)} questions have no passages; their prompts go "
        f"without them, and their {lost}"
    ]
    if config.prompts.templates in _QUOTING:
        told.append(
            f"the templates '{config.prompts.templates}' ask for facts from passages: "
            "prompts.templates 'closed_book' does not"
        )
    teacher = config.teacher
    if (
        isinstance(teacher, FrozenTeacher)
        and teacher.samples > 1
        and teacher.best_by == "factuality"
    ):
        told.append(
            "teacher.best_by is 'factuality', which needs passages: of several right rationales "
            "of a question without them, the shortest is kept"
        )
    return told


def _weighted_without_passages(config: Config) -> list[str]:
    """The weights of aspects that are measured by passages."""
    rewards = config.resolved().rewards
    if not isinstance(rewards, GuidanceRewards):
        return []
    found = []
    for aspect, settings in rewards.aspects.items():
        measures = [f"{settings.source}/{aspect}"]
        if settings.source == "learned" and rewards.learned_model is not None:
            measures = list(load_learned(rewards.learned_model).features)
        if settings.weight > 0 and NEED_PASSAGES.intersection(measures):
            found.append(f"rewards.aspects.{aspect}.weight")
    return found
