"""Tasks: what a question is, and how its answer is read and compared."""

from lmcot.data.tasks.opened import open_task
from lmcot.data.tasks.task import EXTRACTIVE_QA, Scores, Task

__all__ = ["EXTRACTIVE_QA", "Scores", "Task", "open_task"]
