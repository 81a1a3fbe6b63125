"""A round up to its training: sampled, judged, chosen, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from lmcot import run_files
from lmcot.config import training_stage
from lmcot.config.reject import RejectSettings
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.errors import UserError
from lmcot.monitor.progress import say
from lmcot.records import Example
from lmcot.run.budgets import usage_metrics
from lmcot.run.context import Run
from lmcot.training.rationale_table import answers_shown, counts_of_reasons, rationale_table
from lmcot.training.rejection.choosing import (
    answers_rightly,
    as_annotations,
    choose,
    pass_at,
)
from lmcot.training.rejection.files import Record, RoundFiles, failed
from lmcot.training.rejection.sampling import RoundSampling
from lmcot.training.sample_texts import describe_sample, picked

STAGE: Final = training_stage("reject")
_TRY: Final = (
    "a laxer measure of a right answer (reject.right_by, reject.min_f1), more samples "
    "(reject.samples), another temperature (reject.temperature), laxer filters (reject.filters), "
    "or a better policy to begin with (more distillation)"
)


def gather(
    run: Run, settings: RejectSettings, number: int, source: str, learnt: Collection[str]
) -> list[Record]:
    """The rationales that a round keeps; samples and judges what is missing of them.

    Args:
        source: model source of the round's policy.
        learnt: texts of rationales that are learnt anyway, of which no near-duplicates are kept.

    Raises:
        UserError: if nothing is kept.
    """
    files = RoundFiles(run.directory.path / run_files.REJECTION_ROUNDS, number)
    if not files.whole.exists():
        sampling = RoundSampling(run, settings, number, files)
        found = sampling.records(source)
        examples = [one.example for one in run.train]
        records = choose(examples, found, settings, learnt)
        run.monitor.truncate(STAGE.name, number - 1)
        _show_samples(run, number, records)
        metrics = round_metrics(examples, records, settings, run.task)
        run.monitor.log(number, STAGE.name, {**metrics, **usage_metrics(sampling.usage)})
        files.finish(records, rationale_table(examples, as_annotations(records)))
    return _kept(run, number, files)


def round_metrics(
    examples: Sequence[Example],
    records: Sequence[Record],
    settings: RejectSettings,
    task: Task = EXTRACTIVE_QA,
) -> dict[str, float]:
    """What became of a round's rationales."""
    judged = [one for one in records if not failed(one)]
    kept = [one for one in records if one["kept"]]
    asked = any(one["judgement"]["answer"] is not None for one in judged)
    return {
        "rejection/sampled": float(len(records)),
        "rejection/kept": float(len(kept)),
        "rejection/kept_share": len({one["example_id"] for one in kept}) / len(examples),
        **(_shares_of_right(examples, judged, settings, task) if asked else {}),
        **({"reward/mean": _mean([one["reward"] for one in judged])} if judged else {}),
        **({"rejection/reward_kept": _mean([one["reward"] for one in kept])} if kept else {}),
        "response/length": _mean([len(one["response_ids"]) for one in records]),
        "response/cut_share": _mean([one["finish_reason"] == "length" for one in records]),
        "batch/failed": float(len(records) - len(judged)),
    }


def _shares_of_right(
    examples: Sequence[Example], judged: Sequence[Record], settings: RejectSettings, task: Task
) -> dict[str, float]:
    by_id = {one.id: one for one in examples}
    right = Counter(
        one["example_id"]
        for one in judged
        if answers_rightly(by_id[one["example_id"]], one, settings, task)
    )
    # An estimate for k needs k samples: questions of which some could not be judged are left out.
    whole = Counter(one["example_id"] for one in judged)
    counts = [right[name] for name, count in whole.items() if count == settings.samples]
    powers = [2**n for n in range(settings.samples.bit_length()) if 2**n <= settings.samples]
    tried = sorted({*powers, settings.samples}) if counts else []
    return {
        "rejection/solved_share": len(right) / len(examples),
        **{f"rejection/pass_at_{k}": pass_at(counts, settings.samples, k) for k in tried},
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _show_samples(run: Run, number: int, records: Sequence[Record]) -> None:
    rewards = np.array([np.nan if failed(one) else one["reward"] for one in records])
    shown = [records[row] for row in picked(rewards, run.monitor.settings.samples)]
    if shown:
        text = "\n\n---\n\n".join(map(describe_sample, shown))
        run.monitor.text(number, STAGE.name, "samples", text)


def _kept(run: Run, number: int, files: RoundFiles) -> list[Record]:
    """What the round keeps; says how much that is.

    Raises:
        UserError: if it is nothing.
    """
    records = files.result()
    annotations = as_annotations(records)
    reasons = counts_of_reasons(annotations)
    kept = [one for one in records if one["kept"]]
    questions = len({one["example_id"] for one in kept})
    if not kept:
        said = answers_shown((one.example for one in run.train), annotations)
        again = f"delete '{files.folder}' to sample again with other settings"
        if number > 1:
            again = (
                f"set reject.rounds to {number - 1} to end with the policy of round {number - 1}, "
                f"or use another --run-dir with other settings"
            )
        raise UserError(
            f"round {number} has no rationale to learn from, of {len(records)} sampled{reasons}"
            f"{said}; {again}: {_TRY} ('{files.whole}' has all that was sampled)"
        )
    of = f"{questions} of {len(run.train)} questions"
    say(f"reject: round {number} keeps {len(kept)} of {len(records)} rationales, for {of}{reasons}")
    say(files.table.read_text(encoding="utf-8").rstrip())
    return kept
