"""All stages of a run, one after another; each skips what is done already."""

from __future__ import annotations

from lmcot.evaluation.evaluate import check_evaluation, evaluate
from lmcot.run.context import Run
from lmcot.training.annotate import annotate
from lmcot.training.distill import distill
from lmcot.training.refine import refine


def train(run: Run) -> None:
    """Annotates, distils, refines and evaluates."""
    if run.config.frozen is not None:
        check_evaluation(run)
    if run.config.teacher is not None:
        annotate(run)
        distill(run)
    refine(run)
    if run.config.frozen is not None:
        evaluate(run)
