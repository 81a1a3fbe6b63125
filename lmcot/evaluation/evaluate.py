"""Evaluation: what the frozen LM answers with and without guidance, row by row.

Results are kept question by question, so that rerunning the command resumes an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmcot import run_files
from lmcot.config import GivenDemonstrations
from lmcot.config.rows import RowSpec
from lmcot.evaluation.leakage import check_overlap
from lmcot.evaluation.predictions import alike_votes, lacking_answers, one_answer, row_result
from lmcot.evaluation.report import RowResult, write_report
from lmcot.evaluation.rows import check_rows, chooses, chosen_rows
from lmcot.evaluation.store import EvaluationFiles, policy_sources
from lmcot.evaluation.work import do_missing
from lmcot.models.sources import parameters_of
from lmcot.monitor.progress import say
from lmcot.records import Example, Usage
from lmcot.run.budgets import usage_metrics
from lmcot.run.context import Run
from lmcot.run.estimate import Taken, compared
from lmcot.run.first_answers import ask_first
from lmcot.run.fit import VALIDATION
from lmcot.run.model_card import write_model_card
from lmcot.run.presence import what_is_left_out

_BOOTSTRAP_SAMPLES = 2000
"""Resamples behind the confidence intervals."""
_CONFIDENCE = 0.95
"""Level of the confidence intervals."""


def evaluate(run: Run) -> None:
    """Writes ``predictions/`` and the report with its pictures; results that are there are kept.

    Raises:
        UserError: if a row is not possible, or questions are among those of the training.
    """
    policies = policy_sources(run)
    rows = chosen_rows(run.config.evaluate, list(policies))
    note = check_evaluation(run)
    if any(row.rests_on_first_answer for row in rows):
        ask_first(run, run.validation)
    examples = [question.example for question in run.validation]
    files = EvaluationFiles(run, policies, rows, examples)
    usage = None
    if files.missing():
        usage = do_missing(run, policies, files)
    else:
        say("evaluate: all rows are done already, the report is written again")
    left_out = run.left_out.get(VALIDATION)
    notes = [one for one in (note, f"{left_out}." if left_out else None) if one]
    notes += [f"{one}." for one in what_is_left_out(run.config, examples, VALIDATION)]
    notes += _notes_on_advice(run, examples)
    notes += _note_on_choices(run, rows)
    notes += [run.task.note] if run.task.note else []
    report = _report(run, policies, files, notes)
    if usage is not None:
        _log(run, report, usage)


def _notes_on_advice(run: Run, examples: Sequence[Example]) -> list[str]:
    """What the figures of advice hold; nothing without it."""
    if not run.config.prompts.advises:
        return []
    notes = [
        "Guidance is advice: the frozen LM answers first (template "
        f"`{run.config.prompts.first_answer}`), the small LM advises on that, and the frozen LM "
        "answers again. Rows with a rationale, advice here, bear the cost of the first answer."
    ]
    asked = [run.first_answers.of(one) for one in examples]
    if failed := sum(one is not None and bool(one.failure) for one in asked):
        notes.append(f"The first answers to {failed} of {len(asked)} questions failed: the small "
                     "LM advised without them.")  # fmt: skip
    return notes


def _note_on_choices(run: Run, rows: Sequence[RowSpec]) -> list[str]:
    """Which rows go by the likeliest option; nothing if all go by what is written."""
    found = [row.name for row in rows if chooses(run.config, row)]
    if not found:
        return []
    return [
        f"In {', '.join(found)} the answer is the option that the frozen LM finds likeliest after "
        "the prompt (evaluate.choices); the other rows go by what was written."
    ]


def check_evaluation(run: Run) -> str | None:
    """Checks that a run can be evaluated on its questions, before it trains.

    Returns:
        a note for the report; None if there is nothing to note.

    Raises:
        UserError: if the questions lack what a row needs, or the policy learns from them.
    """
    examples = [question.example for question in run.validation]
    check_rows(run.config.evaluate.rows or (), examples)
    return check_overlap(
        [question.example for question in run.train],
        examples,
        allowed=run.config.evaluate.allow_overlap,
    )


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
    """Writes the report and prints it; ``notes`` grows by those on the rows."""
    config = run.config
    results = _results(run, list(policies), files, notes)
    report = write_report(
        run.directory.path,
        results,
        settings=_settings(run, policies, files),
        bootstrap_samples=_BOOTSTRAP_SAMPLES,
        confidence=_CONFIDENCE,
        seed=config.seed,
        notes=notes,
        aspects=files.aspect_means(),
        estimate=compared(run.directory.path, config, _taken(results.values())),
    )
    print((run.directory.path / "report.md").read_text(encoding="utf-8"))
    for policy, source in policies.items():
        if source == str(run.directory.policy(policy)):
            write_model_card(run, policy, report)
    say(f"evaluate: the report is in {run.directory.home / 'report.md'} (and .json, .png)")
    return report


def _taken(rows: Iterable[RowResult]) -> Taken:
    """What the evaluation took."""
    found = Taken(0, 0.0)
    for row in rows:
        tokens = row.large_lm_tokens_in + row.large_lm_tokens_out
        found = Taken(
            found.units + len(row.em),
            (found.seconds or 0.0) + row.seconds,
            found.frozen_tokens + tokens,
        )
    return found


def _results(
    run: Run, policies: list[str], files: EvaluationFiles, notes: list[str]
) -> dict[str, RowResult]:
    """The rows' results by name; ``notes`` grows by what users should know of them."""
    large, small = _parameters(run)
    results: dict[str, RowResult] = {}
    estimated: list[str] = []
    for row in files.rows:
        predictions = files.predicted(row)
        failed = sum(one.failure is not None for one in predictions)
        if failed:
            notes.append(f"{row.name}: {failed} questions failed and are left out of its figures.")
        title = row.label(policies, run.config.evaluate.samples)
        results[row.name] = row_result(row.name, title, predictions, large=large, small=small)
        for note in (lacking_answers, alike_votes, one_answer):
            if told := note(row.name, predictions):
                notes.append(told)
                say(f"evaluate: {told}")
        if any(one.estimated for one in predictions):
            estimated.append(row.name)
    if estimated:
        notes.append(
            f"The frozen LM's endpoint does not count tokens: those of {', '.join(estimated)} are "
            "estimated by length."
        )
    return results


def _demonstrations(run: Run) -> int | str:
    """The demonstrations as the report names them: their number, or how they were drawn."""
    given, wanted = run.demonstrations, run.config.prompts.demonstrations
    if isinstance(wanted, int):
        return wanted
    assert given is not None  # the run has drawn
    if isinstance(wanted, GivenDemonstrations):
        return len(given.examples)
    shown = wanted.count if given.nearest else len(given.examples)
    source = "data.train" if wanted.source == "train" else "prompts.demonstrations.source"
    return f"{shown} {wanted.choose}, drawn from {source} (see {run_files.DEMONSTRATIONS})"


def _settings(run: Run, policies: Mapping[str, str], files: EvaluationFiles) -> dict[str, Any]:
    """The settings that the report names."""
    config = run.config
    settings = {
        "policy": config.policy.source,
        **{f"{name} policy": source for name, source in policies.items() if name != "base"},
        "frozen": config.frozen.model_dump(mode="json") if config.frozen else None,
        "validation": config.data.validation.model_dump(mode="json"),
        "questions": len(files.examples),
        "demonstrations": _demonstrations(run),
    }
    if any(row.votes for row in files.rows):
        settings["votes"] = (
            f"{config.evaluate.samples} at temperature {config.evaluate.temperature}"
        )
    return settings
