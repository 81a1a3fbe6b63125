"""The task that the settings name."""

from __future__ import annotations

from lmcot.config.task import ExtractiveQa, TaskSettings
from lmcot.data.tasks.task import Task


def open_task(settings: TaskSettings) -> Task:
    """The task that the settings name."""
    match settings:
        case ExtractiveQa():
            return Task()
    raise TypeError(f"there is no task for {settings!r}")
