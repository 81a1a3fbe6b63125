"""The task that the settings name."""

from __future__ import annotations

from lmcot.config.task import Boolean, CustomTask, FreeText, MultipleChoice, Numeric, TaskSettings
from lmcot.data.tasks.boolean import BooleanTask
from lmcot.data.tasks.choices import MultipleChoiceTask
from lmcot.data.tasks.free_text import FreeTextTask
from lmcot.data.tasks.numeric import NumericTask
from lmcot.data.tasks.task import EXTRACTIVE_QA, Task
from lmcot.data.tasks.users_own import load_own
from lmcot.errors import UserError


def open_task(settings: TaskSettings) -> Task:
    """The task that the settings name.

    Raises:
        UserError: if the user's own code cannot be loaded, or is no task.
    """
    match settings:
        case Boolean():
            return BooleanTask()
        case MultipleChoice():
            return MultipleChoiceTask(settings)
        case Numeric():
            return NumericTask(settings)
        case FreeText():
            return FreeTextTask(settings)
        case CustomTask():
            return _own(settings.name)
        case _:
            return EXTRACTIVE_QA


def _own(name: str) -> Task:
    made = load_own("task.name", name, "class")
    try:
        task = made()
    except Exception as error:
        raise UserError(
            f"task.name is '{name}', which cannot be called without arguments "
            f"({type(error).__name__}: {error}): define it as a class that derives from "
            "lmcot.data.tasks.Task"
        ) from error
    if not isinstance(task, Task):
        raise UserError(
            f"task.name is '{name}', which is no task: derive it from lmcot.data.tasks.Task"
        )
    return task
