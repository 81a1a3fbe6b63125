"""Which sampled rationales are kept, and why the others are not: pure functions of the records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from lmcot.config.reject import RejectSettings
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.records import Annotation, Example, Prompt
from lmcot.text.duplicates import NearDuplicates
from lmcot.training.filters import Filters, is_right
from lmcot.training.reasons import FAILED, NEAR_DUPLICATE, RIGHT
from lmcot.training.rejection.files import Record, failed

UNASKED: Final = "the rewards ask no frozen LM, so that no answer is wrong"
WRONG: Final = "the frozen LM's answer is wrong"
NO_ANSWER: Final = "the frozen LM came to no answer"
CUT: Final = "cut at policy.max_new_tokens"
EMPTY: Final = "empty"
OTHERS_ARE_BETTER: Final = "good, but others of the question have a higher reward"
_UNREAD: Final = ("prompt_ids", "logprobs")
_GOOD: Final = (RIGHT, UNASKED, OTHERS_ARE_BETTER, NEAR_DUPLICATE)


def is_good(record: Record) -> bool:
    """Whether a rationale is right and passed all filters, whether or not it was chosen."""
    return record["reason"] in _GOOD


def answer_of(record: Record) -> str:
    """The frozen LM's answer; empty if it gave none or was not asked."""
    answer = record["judgement"]["answer"]
    return str(answer["extracted"]) if answer else ""


def answers_rightly(
    example: Example, record: Record, settings: RejectSettings, task: Task = EXTRACTIVE_QA
) -> bool:
    """Whether the frozen LM's answer with a rationale is right; true where it is not asked."""
    if failed(record):
        return False
    if record["judgement"]["answer"] is None:
        return True
    return is_right(answer_of(record), example, settings.right_by, settings.min_f1, task)


def decided(
    example: Example, record: Record, settings: RejectSettings, filters: Filters, prompt: Prompt
) -> Record:
    """The record with ``kept`` and ``reason``, as far as they depend on this rationale alone.

    Args:
        prompt: what the rationale answers.
    """
    reason = _fault(example, record, settings, filters.task) or filters.reason(
        example, record["text"], prompt=prompt
    )
    good = UNASKED if record["judgement"]["answer"] is None else RIGHT
    known = {name: value for name, value in record.items() if name not in _UNREAD}
    return {**known, "kept": not reason, "reason": reason or good}


def _fault(example: Example, record: Record, settings: RejectSettings, task: Task) -> str:
    if failed(record):
        return FAILED + record["judgement"]["failure"]["reason"]
    if not answers_rightly(example, record, settings, task):
        return WRONG if answer_of(record) else NO_ANSWER
    if not record["text"].strip():
        return EMPTY
    return CUT if record["finish_reason"] == "length" else ""


def choose(
    examples: Iterable[Example],
    records: Iterable[Record],
    settings: RejectSettings,
    learnt: Collection[str] = (),
) -> list[Record]:
    """Keeps the best good rationales of each question, and rejects the others with a reason.

    The best are those with the highest reward that are not nearly the same as one that was kept
    before, in the order of the questions; of equals the shortest.

    Args:
        learnt: texts of rationales that are learnt anyway, such as the teacher's.

    Returns:
        the records in the order of the questions and samples.
    """
    threshold = settings.filters.near_duplicates
    kept = NearDuplicates(threshold) if threshold is not None else None
    if kept is not None:
        for text in learnt:
            kept.add(text)
    by_question: dict[str, list[Record]] = defaultdict(list)
    for one in records:
        by_question[one["example_id"]].append(one)
    chosen: list[Record] = []
    for example in examples:
        own = sorted(by_question[example.id], key=lambda one: int(one["sample"]))
        chosen += _best_kept(own, settings.keep, kept)
    return chosen


def _best_kept(own: Sequence[Record], keep: int, kept: NearDuplicates | None) -> list[Record]:
    reasons: dict[int, str] = {}
    left = keep
    good = [place for place, one in enumerate(own) if is_good(one)]
    for place in sorted(good, key=lambda at: (-own[at]["reward"], len(own[at]["response_ids"]))):
        if not left:
            reasons[place] = OTHERS_ARE_BETTER
        elif kept is None or kept.add(own[place]["text"]):
            left -= 1
        else:
            reasons[place] = NEAR_DUPLICATE
    return [
        {**one, "kept": False, "reason": reasons[place]} if place in reasons else one
        for place, one in enumerate(own)
    ]


def pass_at(counts: Sequence[int], samples: int, k: int) -> float:
    """Mean probability that at least one of ``k`` samples of a question is right.

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374), from ``samples`` samples.

    Args:
        counts: number of right samples of each question.
    """
    missed = (math.comb(samples - right, k) / math.comb(samples, k) for right in counts)
    return 1 - sum(missed) / len(counts)


def as_annotations(records: Iterable[Record]) -> list[Annotation]:
    """The records in the form that tables are made of."""
    return [
        Annotation(
            one["example_id"], "rejection", one["text"], answer_of(one), one["kept"],
            one["reason"], sample=one["sample"],
        )
        for one in records
    ]  # fmt: skip
