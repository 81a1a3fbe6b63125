"""Distillation: the small LM learns the teacher's rationales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lmcot.actors.resources.cluster import check_plan
from lmcot.config import training_stage
from lmcot.errors import UserError
from lmcot.monitor.progress import say
from lmcot.records import Annotation
from lmcot.run.context import Run
from lmcot.run.first_answers import ask_first
from lmcot.run.roles import distill_roles
from lmcot.training.annotate import annotate
from lmcot.training.pairs import training_pairs
from lmcot.training.supervised import train_on

STAGE: Final = training_stage("distill")


def distill(run: Run) -> None:
    """Trains on the kept rationales and writes ``distilled/``; does nothing if that is done."""
    if run.directory.finished(STAGE.name):
        say("distill: done already")
        return
    rationales = kept_rationales(annotate(run))
    ask_first(
        run, run.train, (row for row, one in enumerate(run.train) if one.example.id in rationales)
    )
    pairs = training_pairs(run, STAGE, rationales, run.config.distill.answer_task)
    if not pairs:
        raise UserError(
            f"there is nothing to distil: no rationale that was kept in "
            f"'{run.directory.rationales}' belongs to a question of data.train and fits into the "
            "model's window; delete that file, and 'lmcot annotate' makes it again"
        )
    check_plan(STAGE.name, distill_roles(run.config), run.config.actors)
    train_on(run, STAGE, run.config.distill, run.config.policy.source, pairs)


def kept_rationales(annotations: Iterable[Annotation]) -> dict[str, str]:
    """The rationales that were kept, by the id of their question."""
    return {one.example_id: one.rationale for one in annotations if one.kept}
