"""Evaluation during refinement, by the same actors, while they would otherwise be idle.

Its units have low priority in the fleets of the batches: they run only when no unit of a batch
waits, for example while the learners learn. As in a batch, each unit names a version of the policy
and carries its weights, so one policy is evaluated however far the learners have come by then. The
batches stay the same, because rollout actors sample by the seeds that a unit names. The loop waits
for an evaluation only after the last step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lmcot import run_files
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import Packed, WeightsRef
from lmcot.config.rows import find_row, policy_row_name
from lmcot.errors import UserError
from lmcot.evaluation.predictions import Prediction, predict
from lmcot.evaluation.report_text import no_answers
from lmcot.evaluation.requests import answers_of, prompt_units, rationale_units, rationales_of
from lmcot.frozen.cached import Replies
from lmcot.monitor.metrics import EVALUATION, read_metrics
from lmcot.monitor.progress import say
from lmcot.records import Example, Rollout
from lmcot.run.context import Run
from lmcot.run_files import adapters_folder
from lmcot.storage import on_disk, reaching, remove, replacing
from lmcot.training.learners import Learners, Pending
from lmcot.training.pipeline import Fleets, Pipeline

STAGE: Final = EVALUATION
RECORD: Final = "lmcot-best.json"
"""File in the best policy's folder that holds its step and score."""


@dataclass(slots=True)
class _Evaluation:
    """The evaluation of one version of the policy."""

    step: int
    units: dict[str, Sequence[Example]]
    """The questions of each unit that is not finished."""
    rationales: dict[str, list[Any]] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    export: Pending[None] | None = None


class InterimEvaluation:
    """Evaluates the policy every few steps, one version at a time, and keeps the best."""

    def __init__(self, run: Run, fleets: Fleets, learners: Learners, *, after: int) -> None:
        """Drops what was logged of evaluations after a step, so that a resumed run logs it once.

        Args:
            after: the step at which training begins or resumes.
        """
        run.monitor.truncate(STAGE, after)
        self._run = run
        self._settings = run.config.evaluate.during
        # As the rewards ask: what the best policy is chosen by is what is optimised.
        kind = run.config.prompts.guided_kind
        self._row = find_row(policy_row_name(run_files.REFINED, kind))
        self._fleets = fleets
        self._frozen = run.frozen_client(fleets.frozen) if fleets.frozen is not None else None
        self._learners = learners
        self._underway: _Evaluation | None = None
        self._examples: list[Example] = []
        if self._settings.every:
            questions = run.validation[: self._settings.questions]
            self._examples = [question.example for question in questions]

    def due(self, step: int) -> bool:
        """Whether the policy after ``step`` steps is to be evaluated, and was not yet."""
        every = self._settings.every
        if not every or step % every:
            return False
        lines = read_metrics(self._run.monitor.metrics_path)
        if any(line["stage"] == STAGE and line["step"] == step for line in lines):
            return False
        if self._underway is not None:
            say(
                f"skipping the evaluation at step {step}: the one from step {self._underway.step} "
                "is still running; raise evaluate.during.every, or ask fewer questions"
            )
            return False
        return True

    def start(self, step: int, weights: WeightsRef) -> None:
        """Has the policy after ``step`` steps evaluated in the background."""
        name = f"{STAGE}-{step}"
        units = rationale_units(
            self._run.config, self._examples, False, version=step, weights=weights, name=name
        )
        underway = _Evaluation(step, {one.unit_id: one.questions.open() for one in units})
        if self._settings.keep_best:
            underway.export = self._learners.begin_export(self._candidate)
        for one in units:
            self._fleets.rollout.submit(
                RolloutActor.sample, one.unit_id, one, self._sampled, low_priority=True
            )
        self._underway = underway

    def _sampled(self, key: str, rollouts: Packed[list[Rollout]]) -> None:
        """Has the frozen LM answer with a unit's rationales."""
        underway = self._underway
        if underway is None or self._frozen is None:
            raise RuntimeError(f"nobody asked for the rationales of {key}")
        found = rationales_of(rollouts.open(), 1)
        underway.rationales[key] = found
        texts = [one.texts for one in found]
        for unit in prompt_units(self._run, self._row, underway.units[key], texts):
            self._frozen.submit(key, unit)

    def refs(self) -> list[Any]:
        """What a wait for news of the frozen LM's answers waits for."""
        return self._frozen.refs() if self._frozen is not None else []

    def turn(self) -> None:
        """Handles the frozen LM's answers that have arrived; never waits."""
        if self._frozen is not None:
            for key, replies in self._frozen.turn():
                self._answered(key, replies)

    @property
    def frozen_seconds(self) -> float:
        """Seconds that the frozen LM's actors have worked on its questions so far."""
        return self._frozen.seconds if self._frozen is not None else 0.0

    def _answered(self, key: str, replies: Replies) -> None:
        """Scores a unit's answers; the last unit ends the evaluation."""
        underway = self._underway
        if underway is None:
            raise RuntimeError(f"nobody asked for the answers of {key}")
        self._run.spending.add("evaluate", replies.usage)
        task = self._run.task
        examples, rationales = underway.units.pop(key), underway.rationales.pop(key)
        for example, one, reply in zip(examples, rationales, replies.results, strict=True):
            attempts = answers_of(one.texts, [reply], example.question, task)
            underway.predictions.append(
                predict(example, attempts, one, own=True, cached=0.0, seconds=0.0, task=task)
            )
        if not underway.units:
            self._close(underway)

    def abandon(self) -> None:
        """Forgets the evaluation that is under way."""
        if self._underway is not None:
            say(f"the evaluation at step {self._underway.step} was not finished")
        self._underway = None
        if self._frozen is not None:
            self._frozen.abandon()

    def finish(self, pipeline: Pipeline) -> None:
        """Waits for the evaluation that is under way."""
        if self._underway is not None:
            say(f"refine: waiting for the evaluation at step {self._underway.step}")
            pipeline.work_off(lambda: self._underway is None)

    def _close(self, underway: _Evaluation) -> None:
        self._underway = None
        there = [one for one in underway.predictions if one.failure is None]
        failed = len(underway.predictions) - len(there)
        if failed:
            reason = next(one.failure for one in underway.predictions if one.failure is not None)
            say(f"evaluation at step {underway.step}: {failed} questions failed ({reason})")
        if not there:
            return
        scores = {
            metric: 100 * sum(getattr(one, metric) for one in there) / len(there)
            for metric in ("em", "f1", "inclusion")
        }
        if underway.export is not None:
            self._keep_if_best(underway, scores[self._settings.metric])
        lacking = {what: sum(one.missing == what for one in there) for what in ("empty", "cut")}
        row = {**scores, "n": float(len(there)), **lacking}
        self._run.monitor.evaluation(underway.step, {"guided": row})
        told = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
        told += f" ({len(there)} questions{no_answers(**lacking)})"
        say(f"evaluation at step {underway.step}: {told}")

    @property
    def _candidate(self) -> Any:
        return self._run.directory.policy(".candidate")

    def _keep_if_best(self, underway: _Evaluation, value: float) -> None:
        """Keeps a version's export as the best one, or drops it."""
        if underway.export is not None:
            underway.export.result()
        before = best_so_far(self._run)
        if before is not None and before["value"] >= value:
            self._drop_candidate()
            return
        self._learners.finish_export(self._candidate)
        record = {"step": underway.step, "metric": self._settings.metric, "value": value,
                  "questions": len(underway.predictions)}  # fmt: skip
        best = self._run.directory.best
        with on_disk(self._candidate) as candidate, replacing(best) as folder:
            shutil.copytree(candidate, folder, dirs_exist_ok=True)
            (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        self._drop_candidate()
        say(f"evaluation at step {underway.step}: the best so far, kept as best/")

    def _drop_candidate(self) -> None:
        for folder in (self._candidate, adapters_folder(self._candidate)):
            remove(folder)


def best_so_far(run: Run) -> dict[str, Any] | None:
    """The record of the best policy; None if there is none."""
    path = run.directory.best / RECORD
    if not path.exists():
        return None
    try:
        with reaching(path):
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        float(found["value"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the file '{path}' is damaged ({error}): delete the folder it is in; the next "
            "evaluation while refining makes it again"
        ) from None
    return found
