"""What became of the teacher's rationales: a table, and sentences for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from lmcot.records import Annotation, Example
from lmcot.training.reasons import FAILED, WITH_HINT

_SHOWN: Final = 3
"""Answers that are shown."""
_SHOWN_CHARACTERS: Final = 80


def rationale_table(examples: Iterable[Example], annotations: Sequence[Annotation]) -> str:
    """A table in Markdown of the questions, and of the rationales by reason, by question type."""
    types = {one.id: one.type or "no type" for one in examples}
    kept = {one.example_id for one in annotations if one.kept}
    rows: dict[str, Counter[str]] = {"questions": Counter(types.values())}
    rows["questions with a rationale"] = Counter(types[one] for one in kept)
    counted: dict[str, Counter[str]] = {}
    for one in annotations:
        what = f"{'kept' if one.kept else 'rejected'}: {_short_reason(one)}"
        counted.setdefault(what, Counter())[types[one.example_id]] += 1
    order = sorted(counted, key=lambda what: (what.startswith("rejected"), -counted[what].total()))
    rows |= {what: counted[what] for what in order}
    names = sorted(set(types.values()))
    lines = [
        f"| | {' | '.join(names)} | all |",
        f"|---|{'---|' * (len(names) + 1)}",
        *(
            f"| {what} | {' | '.join(str(row[name]) for name in names)} | {row.total()} |"
            for what, row in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def counts_of_reasons(annotations: Iterable[Annotation]) -> str:
    """The reasons of rejections with their numbers, as the end of a sentence."""
    rejected = Counter(one.reason for one in annotations if not one.kept)
    return "".join(f"; {count} rejected: {why}" for why, count in rejected.most_common())


def answers_shown(examples: Iterable[Example], annotations: Iterable[Annotation]) -> str:
    """What some answers looked like, for a teacher that is never right; empty if it said
    nothing."""
    golds = {one.id: one.answer for one in examples}
    said = [one for one in annotations if one.answer or one.rationale]
    shown = [_shown(one, golds) for one in said[:_SHOWN]]
    return f"; what it answered: {'; '.join(shown)}" if shown else ""


def _shown(one: Annotation, golds: Mapping[str, str]) -> str:
    said = one.answer or one.rationale
    cut = said if len(said) <= _SHOWN_CHARACTERS else said[:_SHOWN_CHARACTERS] + "..."
    return f"{cut!r} where {golds[one.example_id]!r} is right"


def _short_reason(one: Annotation) -> str:
    if FAILED not in one.reason:
        return one.reason
    return (WITH_HINT if one.hinted else "") + FAILED.rstrip(": ")
