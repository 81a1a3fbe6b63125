"""Shows what a policy wrote in the terminal; no model is loaded."""

from __future__ import annotations

import difflib
import heapq
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Literal, get_args

from lmcot import run_files
from lmcot.config.prompts import GuidedKind
from lmcot.config.rows import ROWS
from lmcot.errors import UserError
from lmcot.records import LeftOut
from lmcot.rollout_log import RECORD_KEYS, read_records
from lmcot.text.characters import printable

if TYPE_CHECKING:
    from lmcot.storage import Place

Order = Literal["file", "best", "worst"]
_GUIDED = [
    [one.name for one in ROWS.values() if one.prompt == prompt and one.own and not one.votes]
    for prompt in get_args(GuidedKind)
]
"""The rows of the policies, least trained first: with the passages, and without them."""
_LEFT_OUT: Mapping[LeftOut, str] = {
    "right": "all rationales of the question are right",
    "wrong": "all rationales of the question are wrong",
    "equal": "all rationales of the question measure the same",
    "few": "fewer than two rationales of the question could be judged",
}
_OF_A_PREDICTION = ("id", "question", "gold", "rationale", "answer", "em", "f1")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The rationales to show."""

    steps: range | None = None
    """Steps of refinement, or rounds of rejection sampling; unset: the last one."""
    question: str = ""
    """A question's id, or part of its text; empty: any question."""
    limit: int = 5
    order: Order = "file"


@dataclass(frozen=True, slots=True)
class _Written:
    """Files of sampled rationales, of which a run has one for each step or round."""

    unit: Literal["step", "round"]
    what: str
    folder: str
    numbers: Callable[[Place], list[int]]
    name: Callable[[int], str]

    def records(self, run: Place, number: int) -> Iterator[dict[str, Any]]:
        """The records of a step or round, with its number."""
        path = run / self.folder / self.name(number)
        return ({self.unit: number, **record} for record in read_records(path, RECORD_KEYS))

    def there(self, run: Place) -> list[int]:
        """The numbers that the run has, in ascending order.

        Raises:
            UserError: if there are none.
        """
        run_files.check_format(run)
        found = self.numbers(run / self.folder)
        if not found:
            raise UserError(f"'{run}' holds no rationales of {self.what}")
        return found


_STEPS = _Written(
    "step",
    "refinement (rollouts/step-NNNNNN.jsonl)",
    run_files.ROLLOUTS,
    run_files.rollout_steps,
    run_files.rollouts_name,
)
_ROUNDS = _Written(
    "round",
    "rejection sampling (reject/round-N.jsonl)",
    run_files.REJECTION_ROUNDS,
    run_files.rounds,
    run_files.round_name,
)


def parse_steps(text: str) -> range:
    """The steps that a text such as ``7`` or ``3-9`` names.

    Raises:
        UserError: if it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None or int(found[1]) < 1 or int(found[2] or found[1]) < int(found[1]):
        raise UserError(f"--step '{text}' is neither a step, such as 7, nor a range, such as 3-9")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def show_rollouts(
    run: Place, wanted: Wanted, *, rounds: bool = False, as_json: bool = False
) -> None:
    """Prints sampled rationales, with those of earlier steps for the same question.

    Args:
        rounds: those of rejection sampling, round by round, instead of refinement's.

    Raises:
        UserError: if there are none, or none as they are asked for.
    """
    written = _ROUNDS if rounds else _STEPS
    unit, numbers = written.unit, written.there(run)
    chosen = wanted.steps or range(numbers[-1], numbers[-1] + 1)
    records = (
        record
        for number in numbers
        if number in chosen
        for record in written.records(run, number)
        if _is_asked_for(record["example_id"], record.get("question", ""), wanted)
    )
    found = _picked(records, wanted)
    if not found:
        what = f"{unit}s {chosen[0]} to {chosen[-1]}" if len(chosen) > 1 else f"{unit} {chosen[0]}"
        raise UserError(
            f"'{run}' has no such rationale in {what}; it has {unit}s {numbers[0]} to {numbers[-1]}"
        )
    earlier = _earlier(written, run, numbers, found)
    for record in found:
        before = earlier.get(record["example_id"])
        if as_json:
            print(json.dumps({**record, "before": before}, ensure_ascii=False))
        else:
            print(_rollout_text(record, before, unit))


def show_evaluation(run: Place, wanted: Wanted, *, as_json: bool = False) -> None:
    """Prints the refined policy's rationales and answers beside the distilled one's.

    Of the rows that the run was evaluated with: the distilled policy beside the untrained one
    where there is no refined one, and rows without the passages where there are no others.

    Raises:
        UserError: if the run has no two such rows.
    """
    run_files.check_format(run)
    folder = run / run_files.PREDICTIONS
    there = [
        [row for row in rows if (folder / run_files.predictions_name(row)).exists()]
        for rows in _GUIDED
    ]
    pair = next((rows[-2:] for rows in there if len(rows) > 1), None)
    if pair is None:
        raise UserError(
            f"'{run}' holds no predictions of two policies to compare: run 'lmcot evaluate "
            f"--run-dir {run}' first, with rows such as guided_distilled and guided_refined"
        )
    before, after = pair
    earlier = {one["id"]: one for one in _predictions(folder, before)}
    records = (
        {**one, "reward": one["f1"] - earlier[one["id"]]["f1"]}
        for one in _predictions(folder, after)
        if one["id"] in earlier and _is_asked_for(one["id"], one["question"], wanted)
    )
    found = _picked(records, wanted)
    if not found:
        raise UserError(f"'{run}' has no such question in both {before} and {after}")
    for one in found:
        gained = one.pop("reward")
        other = earlier[one["id"]]
        if as_json:
            print(json.dumps({after: one, before: other, "f1_gained": gained}, ensure_ascii=False))
            continue
        head = f"{one['id']}: {one['question']}  [gold: {one['gold']}]"
        print(_heading(head))
        for row, shown, against in ((before, other, None), (after, one, other["rationale"])):
            scores = f"EM {shown['em']:.0f}, F1 {shown['f1']:.2f}"
            said = _safe(shown["answer"]) or "(no answer)"
            print(f"{row} -> {said}{_lacking(shown)}  ({scores})")
            print(_wrapped(_changed(against, shown["rationale"])))


def _lacking(answer: Mapping[str, Any]) -> str:
    """Says if a reply was cut before its answer, or was empty."""
    return f" ({answer['missing']})" if answer.get("missing") else ""


def _predictions(folder: Place, row: str) -> Iterator[dict[str, Any]]:
    return read_records(folder / run_files.predictions_name(row), _OF_A_PREDICTION)


def _is_asked_for(key: str, question: str, wanted: Wanted) -> bool:
    text = wanted.question.lower()
    return not text or text == key.lower() or text in question.lower()


def _picked(records: Iterator[dict[str, Any]], wanted: Wanted) -> list[dict[str, Any]]:
    """The requested number of records, in the requested order; only those are kept in memory."""
    if wanted.order == "file":
        return [record for record, _ in zip(records, range(wanted.limit), strict=False)]
    judged = (record for record in records if record["reward"] is not None)
    pick = heapq.nlargest if wanted.order == "best" else heapq.nsmallest
    return pick(wanted.limit, judged, key=lambda record: record["reward"])


def _earlier(
    written: _Written, run: Place, numbers: Sequence[int], found: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The first rationale of each question, if its step is earlier than all shown."""
    first = min(record[written.unit] for record in found)
    missing = {record["example_id"] for record in found}
    earlier: dict[str, dict[str, Any]] = {}
    for number in numbers:
        if number >= first or not missing:
            break
        for record in written.records(run, number):
            if record["example_id"] in missing:
                earlier[record["example_id"]] = record
                missing.remove(record["example_id"])
    return earlier


def _rollout_text(
    record: Mapping[str, Any], before: Mapping[str, Any] | None, unit: Literal["step", "round"]
) -> str:
    judgement, answer = record["judgement"], record["judgement"]["answer"]
    reward = "not judged" if record["reward"] is None else f"reward {record['reward']:.3g}"
    cut = ", cut" if record["finish_reason"] == "length" else ""
    head = (
        f"{unit} {record[unit]}, {record['example_id']}, sample {record['sample']}: {reward} "
        f"({len(record['response_ids'])} tokens{cut}, policy version {record['policy_version']})"
    )
    lines = [_heading(head)]
    if record.get("question"):
        lines.append(_wrapped(f"Question: {_safe(record['question'])}"))
    if answer is not None:
        gold = _safe(record.get("gold", ""))
        said = _safe(answer["extracted"]) or "(nothing)"
        lines.append(f"Answer: {said}{_lacking(answer)}  [gold: {gold}]")
    if "kept" in record:
        lines.append(f"{'Kept' if record['kept'] else 'Rejected'}: {_safe(record['reason'])}")
    if record.get("left_out"):
        lines.append(f"Left out by refine.filter: {_LEFT_OUT[record['left_out']]}")
    if judgement["failure"] is not None:
        lines.append(f"Failed: {_safe(judgement['failure']['reason'])}")
    if judgement["components"]:
        numbers = ", ".join(f"{k} {v:.2f}" for k, v in judgement["components"].items())
        lines.append(_wrapped(numbers))
    if before is None:
        lines.append(_wrapped(_safe(record["text"])))
    else:
        told = f"first at {unit} {before[unit]}"
        if before["reward"] is not None:
            told += f", reward {before['reward']:.3g}"
        lines.append(f"since it was {told} ([-gone-], {{+new+}}):")
        lines.append(_wrapped(_changed(before["text"], record["text"])))
    return "\n".join(lines)


def _changed(before: str | None, after: str) -> str:
    """The text, with removed words as ``[-words-]`` and new ones as ``{+words+}``."""
    if before is None:
        return _safe(after)
    old, new = _safe(before).split(), _safe(after).split()
    parts = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            parts.append(" ".join(new[c:d]))
            continue
        if b > a:
            parts.append(f"[-{' '.join(old[a:b])}-]")
        if d > c:
            parts.append(f"{{+{' '.join(new[c:d])}+}}")
    return " ".join(parts)


def _safe(text: str) -> str:
    """Without what a terminal would take for a command."""
    return printable(text.replace("\t", " ")).strip()


def _heading(text: str) -> str:
    line = _safe(text)
    bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\n\033[1m{line}\033[0m" if bold else f"\n{line}"


def _wrapped(text: str) -> str:
    width = get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100
    return "\n".join(
        textwrap.fill(line, width, initial_indent="  ", subsequent_indent="  ")
        for line in (text or "(empty)").splitlines()
    )
