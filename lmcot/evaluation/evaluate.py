"""Evaluation: what the frozen LM answers with and without guidance, row by row.

First all rationales, policy by policy; then the answers, row by row; then the rationales' aspects.
All of it is kept question by question: the same command continues where it was left.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from lmcot.actors.fleet import Fleet
from lmcot.actors.frozen_actor import FrozenActor
from lmcot.actors.resources.cluster import check_plan
from lmcot.actors.reward_actor import RewardActor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import Judged, JudgeUnit, Packed
from lmcot.config import Row
from lmcot.config.rows import label, plain, votes
from lmcot.evaluation.leakage import check_overlap
from lmcot.evaluation.predictions import (
    Attempt,
    Prediction,
    alike_votes,
    lacking_answers,
    predict,
    row_result,
)
from lmcot.evaluation.report import RowResult, write_report
from lmcot.evaluation.requests import answers_of, prompt_units, rationale_units, rationales_of
from lmcot.evaluation.rows import check_rows, chosen_rows, shown_rationale
from lmcot.evaluation.store import AspectScores, EvaluationFiles, policy_sources
from lmcot.frozen.cached import Replies
from lmcot.models.sources import parameters_of
from lmcot.monitor.progress import Progress, progress, say
from lmcot.records import Answer, Failure, Rollout, Usage
from lmcot.rewards.scoring import unmeasured
from lmcot.run.budgets import Losses, usage_metrics
from lmcot.run.context import Run, in_units
from lmcot.run.fit import VALIDATION
from lmcot.run.roles import aspect_roles, evaluate_roles
from lmcot.text.reading import read_text

_BOOTSTRAP_SAMPLES = 2000
"""Resamples behind the confidence intervals."""
_CONFIDENCE = 0.95
"""Level of the confidence intervals."""


def evaluate(run: Run) -> None:
    """Writes ``predictions/`` and the report, with its pictures; what is done stays.

    Raises:
        UserError: if a row is asked for that cannot be, or questions are those of the training.
    """
    policies = policy_sources(run)
    rows = chosen_rows(run.config.evaluate, list(policies))
    examples = [question.example for question in run.validation]
    note = check_evaluation(run)
    files = EvaluationFiles(run, policies, rows, examples)
    usage = None
    if files.missing():
        usage = _Evaluation(run, policies, files).work()
    else:
        say("evaluate: all rows are done already, the report is written again")
    left_out = run.left_out.get(VALIDATION)
    notes = [one for one in (note, f"{left_out}." if left_out else None) if one]
    report = _report(run, policies, files, notes)
    if usage is not None:
        _log(run, report, usage)


def check_evaluation(run: Run) -> str | None:
    """Whether a run's questions can be evaluated on, before it trains for that.

    Returns:
        what the report should say of them.

    Raises:
        UserError: if they do not allow the rows, or are among those that it learns from.
    """
    examples = [question.example for question in run.validation]
    check_rows(run.config.evaluate.rows or (), examples)
    return check_overlap(
        [question.example for question in run.train],
        examples,
        allowed=run.config.evaluate.allow_overlap,
    )


class _Laps:
    """Shares the time that passed out over what came meanwhile."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self, parts: int) -> float:
        """Seconds for each of the parts."""
        now = time.monotonic()
        seconds, self._last = (now - self._last) / parts, now
        return seconds


class _Evaluation:
    """Does what is missing."""

    def __init__(self, run: Run, policies: Mapping[str, str], files: EvaluationFiles) -> None:
        self._run = run
        self._policies = policies
        self._files = files
        self._examples = files.examples
        self._by_id = {one.id: one for one in files.examples}
        self._usage = Usage()
        self._frozen: Fleet[FrozenActor]
        self._bar: Progress

    def work(self) -> Usage:
        """Asks the small LM, the frozen LM and the judge, whatever is not on disk.

        Returns:
            what the frozen LM was asked.
        """
        config, files = self._run.config, self._files
        check_plan("evaluate", evaluate_roles(config, list(files.predictions)), config.actors)
        if files.aspects:
            check_plan("evaluate", aspect_roles(config), config.actors)
        with ExitStack() as stack:
            self._frozen = stack.enter_context(self._run.frozen_fleet())
            done = files.total - files.missing()
            bar = progress("evaluate", total=files.total, done=done, unit="question")
            self._bar = stack.enter_context(bar)
            self._write_rationales()
            self._frozen.wait_ready()
            for row in files.predictions:
                self._answer(row)
            self._judge_aspects()
        return self._usage

    def _write_rationales(self) -> None:
        """Of all policies, one after the other, by the same actors."""
        missing = {
            key: found for key in self._files.rationales if (found := self._files.unwritten(*key))
        }
        if not missing:
            return
        (first, _) = next(iter(missing))
        with self._run.rollout_fleet(self._policies[first]) as fleet:
            fleet.wait_ready()
            loaded = first
            for (policy, sampled), rows in missing.items():
                if policy != loaded:
                    source = self._policies[policy]
                    fleet.configure(RolloutActor.use_source, source)
                    loaded = policy
                self._write(fleet, policy, sampled, rows)

    def _write(
        self, fleet: Fleet[RolloutActor], policy: str, sampled: bool, rows: Sequence[int]
    ) -> None:
        """One policy's rationales."""
        config = self._run.config
        kept, laps = self._files.rationales[policy, sampled], _Laps()
        samples = config.evaluate.samples if sampled else 1

        def keep(_: int, unit: Packed[list[Rollout]]) -> None:
            found = rationales_of(unit.open(), samples)
            kept.add(found, seconds=laps.lap(len(found)))
            self._bar.update(len(found))

        examples = [self._examples[row] for row in rows]
        fleet.map(RolloutActor.sample, rationale_units(config, examples, sampled), on_result=keep)
        kept.finish([one.id for one in self._examples])

    def _answer(self, row: Row) -> None:
        """A row's predictions."""
        missing = self._files.unanswered(row)
        if not missing:
            return
        kept, laps, shown = self._files.predictions[row], _Laps(), self._shown(row)
        groups = in_units(missing, self._run.config.actors.prompts_per_unit)
        if row == "small_alone":
            for group in groups:
                attempts = [self._own_answers(row, at, shown[at]) for at in group]
                kept.add(self._predictions(row, group, attempts, 0.0, laps))
                self._bar.update(len(group))
            kept.finish([one.id for one in self._examples])
            return
        run = self._run
        losses = Losses(run.config.failures, len(missing), f"answers of the row {row}")
        each = run.config.evaluate.samples if votes(row) else 1
        came: dict[int, dict[int, Replies]] = {}

        def keep(index: int, unit: Replies) -> None:
            self._usage += unit.usage
            run.spending.add("evaluate", unit.usage)
            number, attempt = divmod(index, each)
            came.setdefault(number, {})[attempt] = unit
            if len(came[number]) < each:
                return
            units, group = came.pop(number), groups[number]
            attempts = [
                answers_of(shown[at], [units[k].results[i] for k in range(each)])
                for i, at in enumerate(group)
            ]
            saved = sum(one.usage.asked - one.usage.sent for one in units.values())
            found = self._predictions(row, group, attempts, saved / len(group), laps)
            kept.add(found)
            self._bar.update(len(group))
            losses.add(_first_failure(one) for one in attempts)

        units = [
            unit
            for group in groups
            for unit in prompt_units(
                run,
                row,
                [self._examples[at] for at in group],
                [shown[at] for at in group],
            )
        ]
        self._frozen.map(FrozenActor.complete, units, on_result=keep)
        kept.finish([one.id for one in self._examples])

    def _own_answers(self, row: Row, at: int, shown: Sequence[str]) -> list[Attempt]:
        """What the small LM's own rationales answer."""
        written = self._files.rationales_for(row, self._examples[at].id)
        reasons = written.finish_reasons if written else ["eos"] * len(shown)
        found = [
            read_text(text, cut=reason == "length")
            for text, reason in zip(shown, reasons, strict=True)
        ]
        return [
            Attempt(text, Answer("", one.answer, 0, 0, one.missing))
            for text, one in zip(shown, found, strict=True)
        ]

    def _shown(self, row: Row) -> list[list[str]]:
        """The rationales that are shown with each question: none, one, or as many as vote."""
        if plain(row) in ("standard", "cot"):
            return [[] for _ in self._examples]
        written = self._files.texts(row)
        if votes(row):
            return [written[one.id] for one in self._examples]
        greedy = {key: texts[0] for key, texts in written.items()}
        seed = self._run.config.seed
        return [
            [shown_rationale(row, at, self._examples, greedy, seed)]
            for at in range(len(self._examples))
        ]

    def _predictions(
        self,
        row: Row,
        group: Sequence[int],
        attempts: Sequence[Sequence[Attempt]],
        cached: float,
        laps: _Laps,
    ) -> list[Prediction]:
        seconds = laps.lap(len(group))
        own = row.startswith("guided_") or row == "small_alone"
        return [
            predict(
                self._examples[at],
                tried,
                self._files.rationales_for(row, self._examples[at].id),
                own=own,
                asked=row != "small_alone",
                cached=cached,
                seconds=seconds,
            )
            for at, tried in zip(group, attempts, strict=True)
        ]

    def _judge_aspects(self) -> None:
        """Aspect scores of the greedy rationales, policy by policy."""
        missing = {
            policy: found
            for policy in self._files.aspects
            if (found := self._files.unjudged(policy))
        }
        if not missing:
            return
        run = self._run
        with run.reward_fleet() as fleet:
            fleet.wait_ready(frozen_handles=self._frozen.handles)
            for policy, rows in missing.items():
                self._judge(fleet, policy, rows)

    def _judge(self, fleet: Fleet[RewardActor], policy: str, rows: Sequence[int]) -> None:
        """One policy's rationales; the next evaluation tries those again that failed."""
        run, kept = self._run, self._files.aspects[policy]
        losses = Losses(run.config.failures, len(rows), f"judgements of the {policy} policy")
        groups = in_units(rows, run.config.actors.prompts_per_unit)

        def keep(index: int, judged: Judged) -> None:
            self._usage += judged.usage
            run.spending.add("evaluate", judged.usage)
            kept.add(
                AspectScores.of(self._examples[at].id, one)
                for at, one in zip(groups[index], judged.judgements, strict=True)
                if one.failure is None
            )
            self._bar.update(len(judged.judgements))
            run.tell_unmeasured(unmeasured(judged.judgements).items())
            losses.add(one.failure for one in judged.judgements if one.failure is not None)

        fleet.map(
            RewardActor.judge, [self._judge_unit(policy, one) for one in groups], on_result=keep
        )
        kept.finish([one.id for one in self._examples])

    def _judge_unit(self, policy: str, rows: Sequence[int]) -> JudgeUnit:
        examples = tuple(self._examples[at] for at in rows)
        texts = tuple(self._files.rationale(policy, one.id).texts[0] for one in examples)
        return JudgeUnit(f"evaluate/{policy}/{rows[0]}", Packed.of(examples), texts)


def _first_failure(attempts: Sequence[Attempt]) -> Failure | None:
    """Of a question all of whose attempts failed."""
    failures = [one.answer for one in attempts if isinstance(one.answer, Failure)]
    return failures[0] if len(failures) == len(attempts) else None


def _parameters(run: Run) -> tuple[int | None, int]:
    """Sizes of the frozen and of the small LM; None where an endpoint does not tell."""
    small, frozen = parameters_of(run.config.policy.source), run.config.frozen
    if frozen is None:
        return None, small
    if frozen.local_source is not None:
        return parameters_of(frozen.local_source), small
    return frozen.known_parameters, small


def _log(run: Run, report: Mapping[str, Any], usage: Usage) -> None:
    """The rows' scores as metrics, at the step that the run has come to; once for each step."""
    refined = run.directory.finished("refine")
    scores = {
        name: {
            metric: float(row[metric]) for metric in ("em", "f1", "inclusion", "n", "empty", "cut")
        }
        for name, row in report["rows"].items()
    }
    step = refined["steps"] if refined else 0
    run.monitor.truncate("evaluate", step - 1)
    run.monitor.evaluation(step, scores, stage="evaluate", others=usage_metrics(usage))


def _report(
    run: Run, policies: Mapping[str, str], files: EvaluationFiles, notes: list[str]
) -> dict[str, Any]:
    config = run.config
    large, small = _parameters(run)
    names = list(policies)
    results: dict[str, RowResult] = {}
    estimated: list[str] = []
    for row in files.predictions:
        predictions = files.predicted(row)
        failed = sum(one.failure is not None for one in predictions)
        if failed:
            notes.append(f"{row}: {failed} questions failed and are left out of its figures.")
        title = label(row, names, config.evaluate.samples)
        results[row] = row_result(row, title, predictions, large=large, small=small)
        for told in (lacking_answers(row, predictions), alike_votes(row, predictions)):
            if told:
                notes.append(told)
                say(f"evaluate: {told}")
        if any(one.estimated for one in predictions):
            estimated.append(row)
    if estimated:
        notes.append(
            f"The frozen LM's endpoint does not count tokens: those of {', '.join(estimated)} are "
            "estimated by length."
        )
    settings = {
        "policy": config.policy.source,
        **{f"{name} policy": source for name, source in policies.items() if name != "base"},
        "frozen": config.frozen.model_dump(mode="json") if config.frozen else None,
        "validation": config.data.validation.model_dump(mode="json"),
        "questions": len(files.examples),
        "demonstrations": config.prompts.demonstrations,
    }
    if any(votes(row) for row in results):
        settings["votes"] = (
            f"{config.evaluate.samples} at temperature {config.evaluate.temperature}"
        )
    report = write_report(
        run.directory.path,
        results,
        settings=settings,
        bootstrap_samples=_BOOTSTRAP_SAMPLES,
        confidence=_CONFIDENCE,
        seed=config.seed,
        notes=notes,
        aspects=files.aspect_means(),
    )
    print((run.directory.path / "report.md").read_text(encoding="utf-8"))
    say(f"evaluate: the report is in {run.directory.home / 'report.md'} (and .json, .png)")
    return report
