"""Rejection sampling: in rounds, the small LM learns the best right ones of its own rationales."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from lmcot import run_files
from lmcot.actors.resources.cluster import check_plan
from lmcot.config import training_stage
from lmcot.config.reject import RejectSettings
from lmcot.config.stages import TRAINING_STAGES
from lmcot.errors import UserError
from lmcot.monitor.progress import say
from lmcot.run.context import Run
from lmcot.run.directory import read_annotations
from lmcot.run.first_answers import ask_first
from lmcot.run.inputs import check_functions
from lmcot.run.model_card import write_model_card
from lmcot.run.policies import check_policy
from lmcot.run.roles import distill_roles
from lmcot.storage import on_disk, replacing
from lmcot.training.pairs import sampled_pairs, training_pairs
from lmcot.training.rejection.gathering import gather
from lmcot.training.supervised import train_on

if TYPE_CHECKING:
    from lmcot.storage import Place

STAGE: Final = training_stage("reject")


def reject(run: Run) -> None:
    """Goes through the rounds and writes ``rejection/``; resumes a round that was interrupted.

    Raises:
        UserError: before any actor starts, if there is no policy to sample with; if nothing that
            a round sampled is right.
    """
    settings = run.config.reject
    if settings is None:
        raise UserError("reject needs a 'reject' section in the settings")
    finished = run.directory.finished(STAGE.name)
    if finished and finished["rounds"] >= settings.rounds:
        say(f"reject: done already, {finished['rounds']} rounds")
        return
    if finished:
        _check_nothing_stands_on(run)
    check_functions(run)
    check_policy(
        run.directory, run.config, settings.start_from, "to sample with", "reject.start_from"
    )
    ask_first(run, run.train)
    taught = _taught(run, settings)
    for number in range(1, settings.rounds + 1):
        if run.directory.finished(STAGE.of_round(number).training) is None:
            _round(run, settings, number, taught)
    _take_over(run, settings.rounds)
    last = run.directory.finished(STAGE.of_round(settings.rounds).training)
    run.directory.finish(STAGE.name, **{**(last or {}), "rounds": settings.rounds})
    write_model_card(run, STAGE.policy)


def _round(run: Run, settings: RejectSettings, number: int, taught: Mapping[str, str]) -> None:
    source = _sampler(run, settings, number)
    kept = gather(run, settings, number, source, list(taught.values()))
    examples = {one.example.id: one.example for one in run.train}
    own = [(examples[one["example_id"]], one["text"], one["response_ids"]) for one in kept]
    task = settings.answer_task
    pairs = [*training_pairs(run, STAGE, taught, task), *sampled_pairs(run, own, task)]
    check_plan(STAGE.name, distill_roles(run.config), run.config.actors)
    trained = run.config.policy.source if settings.train_from == "base" else source
    train_on(run, STAGE.of_round(number), settings, trained, pairs)


def _check_nothing_stands_on(run: Run) -> None:
    """Refuses further rounds once a later stage has begun with the policy of the last one.

    Raises:
        UserError: naming the stage.
    """
    begun = run.directory.begun(run.config)
    later = [one.name for one in TRAINING_STAGES[TRAINING_STAGES.index(STAGE) + 1 :]]
    if run.config.refine.start_from == STAGE.policy and (found := [n for n in later if n in begun]):
        raise UserError(
            f"'{found[0]}' has begun with the policy '{STAGE.policy}' of this run directory, which "
            "further rounds (reject.rounds) would replace: use another --run-dir"
        )


def _sampler(run: Run, settings: RejectSettings, number: int) -> str:
    """Model source of the policy that samples in a round."""
    if number > 1:
        return str(run.directory.policy(STAGE.of_round(number - 1).policy))
    if settings.start_from == run_files.DISTILLED:
        return str(run.directory.policy(run_files.DISTILLED))
    return run.config.policy.source


def _taught(run: Run, settings: RejectSettings) -> dict[str, str]:
    """The teacher's kept rationales, by question, if they are learnt too.

    Raises:
        UserError: if there are none.
    """
    if not settings.teacher_rationales:
        return {}
    found = read_annotations(run.directory.rationales)
    if not found:
        raise UserError(
            f"reject.teacher_rationales is true, but there are none in '{run.directory.path}': run "
            "'lmcot annotate' on this run directory first, or set it to false"
        )
    return {one.example_id: one.rationale for one in found if one.kept}


def _take_over(run: Run, rounds: int) -> None:
    """Makes the last round's policy the stage's."""
    trained = run.directory.policy(STAGE.of_round(rounds).policy)
    _copy(trained, run.directory.policy(STAGE.policy))
    adapters = run_files.adapters_folder(trained)
    if adapters.is_dir():
        _copy(adapters, run_files.adapters_folder(run.directory.policy(STAGE.policy)))


def _copy(source: Place, target: Place) -> None:
    with on_disk(source) as found, replacing(target) as folder:
        shutil.copytree(found, folder, dirs_exist_ok=True)
