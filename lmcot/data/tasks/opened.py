"""The task that the settings name."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from lmcot.config.task import Boolean, CustomTask, FreeText, MultipleChoice, Numeric, TaskSettings
from lmcot.data.tasks.boolean import BooleanTask
from lmcot.data.tasks.choices import MultipleChoiceTask
from lmcot.data.tasks.free_text import FreeTextTask
from lmcot.data.tasks.functions import FunctionTask
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
            return _own(settings)
        case _:
            return EXTRACTIVE_QA


def _own(settings: CustomTask) -> Task:
    name = settings.name
    made = load_own("task.name", name, "class or function")
    if not inspect.isclass(made) and _compares(made):
        return FunctionTask(name, made, settings.read, settings.fields)
    if settings.read or settings.fields:
        raise UserError(
            f"task.read and task.fields belong to a function, but task.name is '{name}', which is "
            "none that takes an answer and the right ones: leave them out, or name one"
        )
    try:
        task = made()
    except Exception as error:
        raise UserError(
            f"task.name is '{name}', which cannot be called without arguments "
            f"({type(error).__name__}: {error}): define it as a class that derives from "
            "lmcot.data.tasks.Task, or as a function of an answer and the right ones"
        ) from error
    if not isinstance(task, Task):
        raise UserError(
            f"task.name is '{name}', which is no task: derive it from lmcot.data.tasks.Task"
        )
    return task


def _compares(found: Callable[..., object]) -> bool:
    """Whether it can be called with an answer and the right ones."""
    try:
        inspect.signature(found).bind("", ())
    except (TypeError, ValueError):
        return False
    return True
