"""Evaluation: what the frozen LM answers with and without guidance, row by row."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from lmcot.actors.cluster import check_plan
from lmcot.actors.fleet import Fleet
from lmcot.actors.units import Packed, PromptUnit, RolloutUnit
from lmcot.config import Row, TransformersFrozen, flat_settings, may_change
from lmcot.errors import UserError
from lmcot.frozen.cached import Replies
from lmcot.models.sources import parameters_of
from lmcot.monitor.progress import Progress, progress, say
from lmcot.monitor.report import RowResult, write_report
from lmcot.records import Completion, Example, Failure, Prompt, Rollout, Usage
from lmcot.rewards.answers import concluded_answer, extract_answer
from lmcot.rewards.judge import reply_sampling
from lmcot.stages.budgets import Losses
from lmcot.stages.plan import evaluate_roles
from lmcot.stages.predictions import (
    Prediction,
    predict,
    read_predictions,
    row_result,
    write_predictions,
)
from lmcot.stages.run import Run, in_units
from lmcot.stages.summary import usage_metrics

_POLICIES = {"guided_base": "base", "guided_distilled": "distilled", "guided_refined": "refined"}


def evaluate(run: Run) -> None:
    """Writes ``predictions/ROW.jsonl`` and ``report.{json,md,png}``; rows that are done stay."""
    sources = _policy_sources(run)
    rows, notes = _possible_rows(run, sources)
    marks = {row: _fingerprint(run, _source_of(row, sources)) for row in rows}
    done = {
        row: found
        for row in rows
        if (found := read_predictions(run.directory.predictions / f"{row}.jsonl", marks[row]))
    }
    todo = [row for row in rows if row not in done]
    if todo:
        done.update(_Evaluation(run, sources, marks).run(todo))
    elif (run.directory.path / "report.json").exists():
        say("evaluate: rows done already, writing the report anew")
    _report(run, [row for row in rows if row in done], done, sources, notes)


def _policy_sources(run: Run) -> dict[str, str]:
    """The model source of each policy that there is, least trained first."""
    sources = {"base": run.config.policy.source}
    if run.directory.finished("distill"):
        sources["distilled"] = str(run.directory.distilled)
    if run.directory.finished("refine"):
        sources["refined"] = str(run.directory.refined)
    return sources


def _possible_rows(run: Run, sources: dict[str, str]) -> tuple[list[Row], list[str]]:
    """The rows asked for, in the report's order, less those whose policy is not there."""
    rows: list[Row] = []
    notes = []
    for row in get_args(Row):
        if row not in run.config.evaluate.rows:
            continue
        if row in _POLICIES and _POLICIES[row] not in sources:
            notes.append(f"{row} is left out: this run has no {_POLICIES[row]} policy.")
            continue
        rows.append(row)
    if not rows:
        raise UserError("evaluate.rows holds no row that this run has a policy for: add one")
    return rows, notes


def _source_of(row: Row, sources: dict[str, str]) -> str:
    """Which policy's rationales a row reads; small_alone takes the most trained one."""
    if row in _POLICIES:
        return sources[_POLICIES[row]]
    return list(sources.values())[-1] if row == "small_alone" else ""


def _fingerprint(run: Run, source: str) -> str:
    """Changes when the settings that predictions depend on do, or the policy's weights."""
    config = {k: v for k, v in flat_settings(run.config).items() if not may_change(k)}
    files = sorted(Path(source).glob("*.safetensors")) if source else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([config, source, stamps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Evaluation:
    """The actors of one evaluation, and the rationales that several rows share."""

    def __init__(self, run: Run, sources: dict[str, str], marks: dict[Row, str]) -> None:
        self._run = run
        self._sources = sources
        self._marks = marks
        self._rationales: dict[str, tuple[list[Rollout], float]] = {}
        self._usage = Usage()

    def run(self, rows: Sequence[Row]) -> dict[Row, list[Prediction]]:
        """Predictions of each row; each is on disk once it is done."""
        config = self._run.config
        roles = evaluate_roles(config, rows)
        check_plan("evaluate", roles, config.actors)
        with ExitStack() as stack:
            self._frozen = stack.enter_context(self._run.frozen_fleet())
            if "rollout" in roles:
                first = self._run.rollout_fleet(config.policy.source)
                self._rollout: Fleet = stack.enter_context(first)
                self._rollout.wait_ready()
            self._frozen.wait_ready()
            bar = stack.enter_context(progress("evaluate", total=len(rows), unit="row"))
            predictions = {row: self._row(row, bar) for row in rows}
        self._run.monitor.log(0, "evaluate", usage_metrics(self._usage))
        return predictions

    def _row(self, row: Row, bar: Progress) -> list[Prediction]:
        started = time.monotonic()
        rationales, small_seconds = self._rationales_for(row)
        answered = time.monotonic()
        if row == "small_alone":
            texts = [concluded_answer(rollout.text) for rollout in rationales]
            answers: Sequence[Completion | Failure | None] = [None] * len(texts)
        else:
            answers = self._answers(row, rationales)
            read = concluded_answer if row == "cot" else extract_answer
            texts = [read(a.text) if isinstance(a, Completion) else "" for a in answers]
        seconds = small_seconds + time.monotonic() - answered
        if row == "small_alone":
            seconds = small_seconds
        predictions = predict(self._examples, rationales, answers, texts, seconds)
        path = self._run.directory.predictions / f"{row}.jsonl"
        write_predictions(path, predictions, self._marks[row])
        bar.update(1, seconds=time.monotonic() - started)
        return predictions

    @property
    def _examples(self) -> list[Example]:
        return [question.example for question in self._run.validation]

    def _rationales_for(self, row: Row) -> tuple[list[Rollout], float]:
        """Greedy rationales of the row's policy, and the seconds that they took."""
        source = _source_of(row, self._sources)
        if not source:
            return [], 0.0
        if source not in self._rationales:
            self._rollout.call("use_source", restored=True, source=source)
            started = time.monotonic()
            units = self._rollout.map("sample", self._rollout_units())
            rollouts = [rollout for unit in units for rollout in unit.open()]
            self._rationales[source] = (rollouts, time.monotonic() - started)
        return self._rationales[source]

    def _rollout_units(self) -> list[RolloutUnit]:
        config = self._run.config
        examples = self._examples
        return [
            RolloutUnit(
                unit_id=f"evaluate/{rows[0]}",
                questions=Packed.of(tuple(examples[i] for i in rows)),
                samples=1,
                temperature=0.0,
                max_new_tokens=config.policy.max_new_tokens,
                seed=config.seed,
                step=0,
                policy_version=0,
            )
            for rows in in_units(range(len(examples)), config.actors.prompts_per_unit)
        ]

    def _answers(self, row: Row, rationales: Sequence[Rollout]) -> list[Completion | Failure]:
        """The frozen LM's replies, greedy."""
        frozen = self._run.config.frozen
        if frozen is None:
            raise UserError("evaluate asks the frozen LM, but there is no 'frozen' section")
        prompts = [
            self._prompt(row, index, rationales) for index in range(len(self._run.validation))
        ]
        length = frozen.max_rationale_tokens if row == "cot" else frozen.max_answer_tokens
        file = self._run.templates.file
        template = {"cot": file.cot, "standard": file.standard}.get(row, file.guided)
        sampling = reply_sampling(template, length)
        units = [
            PromptUnit(f"{row}/{rows[0]}", tuple(prompts[i] for i in rows), sampling)
            for rows in in_units(range(len(prompts)), self._run.config.actors.prompts_per_unit)
        ]
        run = self._run
        losses = Losses(run.config.failures, len(prompts), f"answers of the row {row}")

        def count(_: int, unit: Replies) -> None:
            self._usage += unit.usage
            run.spending.add("evaluate", unit.usage)
            losses.add(one if isinstance(one, Failure) else None for one in unit.results)

        done: list[Replies] = self._frozen.map("complete", units, on_result=count)
        return [answer for unit in done for answer in unit.results]

    def _prompt(self, row: Row, index: int, rationales: Sequence[Rollout]) -> Prompt:
        example = self._run.validation[index].example
        templates, shown = self._run.templates, self._run.config.prompts.demonstrations
        if row == "standard":
            return templates.standard(example, shown)
        if row == "cot":
            return templates.cot(example, shown)
        return templates.guided(example, rationales[index].text, shown)


def _parameters(run: Run) -> tuple[int | None, int]:
    """Sizes of the frozen and of the small LM; None where an endpoint does not tell."""
    small, frozen = parameters_of(run.config.policy.source), run.config.frozen
    if isinstance(frozen, TransformersFrozen):
        return parameters_of(frozen.source), small
    return (frozen.parameters if frozen else None), small


def _report(
    run: Run,
    rows: list[Row],
    done: dict[Row, list[Prediction]],
    sources: dict[str, str],
    notes: list[str],
) -> None:
    config = run.config
    large, small = _parameters(run)
    most_trained = list(sources)[-1]
    results: dict[str, RowResult] = {
        row: row_result(row, done[row], most_trained, large=large, small=small) for row in rows
    }
    for row in rows:
        failed = sum(p.failure is not None for p in done[row])
        if failed:
            notes.append(f"{row}: {failed} questions failed and are left out of its figures.")
    write_report(
        run.directory.path,
        results,
        settings={
            "policy": config.policy.source,
            "frozen": config.frozen.model_dump(mode="json") if config.frozen else None,
            "validation": config.data.validation.model_dump(mode="json"),
            "demonstrations": config.prompts.demonstrations,
        },
        bootstrap_samples=config.evaluate.bootstrap_samples,
        confidence=config.evaluate.confidence,
        seed=config.seed,
        notes=notes,
    )
    print((run.directory.path / "report.md").read_text(encoding="utf-8"))
    say(f"evaluate: the report is in {run.directory.path / 'report.md'} (and .json, .png)")
