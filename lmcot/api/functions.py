"""Rewards and teachers that a program or a notebook defines as plain functions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmcot.config import Config, DrawnDemonstrations, GuidanceRewards
from lmcot.data import load_examples
from lmcot.data.tasks import open_task
from lmcot.errors import UserError
from lmcot.files import read_lines
from lmcot.monitor.progress import progress
from lmcot.records import Example
from lmcot.rewards.custom import CustomReward

Teacher = Callable[[Example], str | Sequence[str] | None]
"""Writes a question's rationales, each of which ends in ``So the answer is ANSWER.``; None: it has
none."""
Weighed = CustomReward | tuple[CustomReward, float]
"""A reward, of weight 1 or of the weight that is given with it."""

_MOST_BYTES = 64 * 1024
"""Largest size of the functions: Ray sends what is larger apart from the actor, which could then
not be restarted."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """Custom rewards of a program: what settings say of them, and the functions themselves."""

    settings: dict[str, Any] = field(default_factory=dict)
    """The section ``rewards.custom``."""
    functions: dict[str, CustomReward] = field(default_factory=dict)
    """The functions by the names that this section calls them."""

    @staticmethod
    def of(given: Mapping[str, Weighed]) -> Rewards:
        """Rewards by names of one's own.

        Raises:
            UserError: if they cannot be sent to the reward actors.
        """
        found = Rewards()
        for name, one in given.items():
            function, weight = one if isinstance(one, tuple) else (one, 1.0)
            if not callable(function):
                raise UserError(
                    f"the reward '{name}' is {function!r:.60}: give a function, or a function and "
                    "its weight"
                )
            where = _name_of(name, function)
            found.settings[name] = {"function": where, "weight": weight}
            found.functions[where] = function
        _check_size(found.functions)
        return found


def _name_of(name: str, function: CustomReward) -> str:
    """``module:function`` where a module has it, so that the settings mean the same elsewhere."""
    module = getattr(function, "__module__", None) or "__main__"
    own = getattr(function, "__name__", "")
    importable = module != "__main__" and getattr(sys.modules.get(module), own, None) is function
    return f"{module}:{own}" if importable else f"__main__:{name}"


def _check_size(functions: Mapping[str, CustomReward]) -> None:
    from ray import cloudpickle

    for name, function in functions.items():
        try:
            size = len(cloudpickle.dumps(function))
        except Exception as error:  # pickling calls the user's own classes
            raise UserError(
                f"the reward '{name}' cannot be sent to the reward actors ({error}): use nothing "
                "in it that belongs to this process, such as an open file or a connection"
            ) from error
        if size > _MOST_BYTES:
            raise UserError(
                f"the reward '{name}' takes {size:,} bytes with the data that it uses, and may "
                f"take {_MOST_BYTES:,}: read the data within the function, or put both into a "
                "module"
            )


def with_rewards(config: Config, rewards: Rewards) -> dict[str, Any]:
    """The overrides that put a program's rewards beside those of the settings.

    Raises:
        UserError: if the settings have no such rewards, or one without a name.
    """
    if not rewards.settings:
        return {}
    if not isinstance(config.rewards, GuidanceRewards):
        raise UserError(
            f"rewards.kind is '{config.rewards.kind}', which takes no rewards of your own: set it "
            "to 'guidance'"
        )
    if isinstance(config.rewards.custom, str):
        raise UserError(
            f"rewards.custom names '{config.rewards.custom}': give that function in 'rewards', "
            "too, by a name of its own, and leave rewards.custom out"
        )
    there = {name: one.model_dump() for name, one in (config.rewards.custom or {}).items()}
    return {"rewards.custom": {**there, **rewards.settings}}


def write_rationales(teacher: Teacher, config: Config, file: Path) -> None:
    """Asks a teacher for the rationales of the training questions, as the teacher ``file`` reads
    them. Questions that are in the file already are not asked again.

    Raises:
        UserError: if the questions cannot be read, or the function fails or returns something else.
    """
    remedy = "delete that line, and its question is asked again"
    known = {one["id"] for one in read_lines(file, remedy, needed=("id",))}
    examples = [one for one in _training_questions(config) if one.id not in known]
    if not examples:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    _drop_unfinished_line(file)
    with file.open("a", encoding="utf-8") as lines, progress("teacher", len(examples)) as bar:
        for example in examples:
            records = [{"id": example.id, "rationale": one} for one in _asked(teacher, example)]
            # In one piece, so that a question is in the file with all its rationales or not at all.
            lines.write("".join(json.dumps(one) + "\n" for one in records))
            lines.flush()
            bar.update()


def _training_questions(config: Config) -> list[Example]:
    """The training questions, and those that may become demonstrations."""
    data, shown = config.data, config.prompts.demonstrations
    limit = data.max_train
    if limit is not None and isinstance(shown, DrawnDemonstrations):
        limit += shown.pool
    loaded = load_examples(
        data.train, limit=limit, on_bad=data.on_bad_record,
        task=open_task(config.task), require_context=config.requires_context,
    )  # fmt: skip
    return loaded.examples


def _asked(teacher: Teacher, example: Example) -> Sequence[str]:
    try:
        found = teacher(example)
    except Exception as error:
        raise UserError(
            f"the teacher raised {type(error).__name__}: {error} for the question '{example.id}': "
            "fix it, and run the same again: what it wrote before is kept"
        ) from error
    if found is None or isinstance(found, str):
        return [found or ""]
    texts = list(found) if isinstance(found, Sequence) else [found]
    if not all(isinstance(one, str) for one in texts):
        raise UserError(
            f"the teacher returned {found!r:.100} for the question '{example.id}': it must return "
            "a text, a list of texts, or None"
        )
    return texts or [""]


def _drop_unfinished_line(file: Path) -> None:
    """Takes off what a kill has left of a line."""
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.write_bytes(whole)
