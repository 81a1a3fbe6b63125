"""What an evaluation keeps of each question, one JSON line each, and what a row adds up to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmcot.files import write_atomically
from lmcot.monitor.report import RowResult
from lmcot.records import Completion, Example, Failure
from lmcot.rewards.answers import contains_gold, exact_match, f1, inclusion
from lmcot.rewards.copying import copied_share
from lmcot.rewards.vote import vote


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question's outcome in one row; scores and shares are 0 to 1."""

    id: str
    question: str
    gold: str
    type: str
    level: str
    rationale: str
    """What the frozen LM read; where it read several, one that led to the answer."""
    reply: str
    """What the frozen LM wrote; empty where it was not asked."""
    answer: str
    """The answer read out of the reply (of the rationale, where the small LM answers alone)."""
    em: float
    f1: float
    inclusion: float
    contains_gold: bool | None
    """Whether the small LM's rationale holds the gold answer; None where there is none."""
    copied: float | None
    """Share of that rationale's words that are copied from the context (`copied_share`)."""
    votes: list[dict[str, str]]
    """Each ``{"rationale", "reply", "answer"}`` of a ``+sc`` row."""
    share: float
    """Of the votes for the answer."""
    large_lm_tokens_in: int
    large_lm_tokens_out: int
    small_lm_tokens_in: int
    small_lm_tokens_out: int
    requests: int
    cached_requests: float
    """Of them, answered by the frozen LM's cache: their tokens count all the same."""
    seconds: float
    """The row's seconds, shared out over the questions that came together."""
    failure: str | None


@dataclass(frozen=True, slots=True)
class Rationales:
    """What one policy wrote for a question."""

    id: str
    texts: list[str]
    tokens_in: int
    """Of the prompt, which is read once for all of them."""
    tokens_out: list[int]
    finish_reasons: list[str]
    seconds: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way from a question to an answer: what was shown to the frozen LM, what it replied."""

    rationale: str
    reply: Completion | Failure | None
    """None where it was not asked."""
    answer: str


def predict(
    example: Example,
    attempts: Sequence[Attempt],
    rationales: Rationales | None,
    *,
    own: bool,
    cached: float,
    seconds: float,
) -> Prediction:
    """Scores what one question's attempts came to: the only one, or the vote of several.

    Attempts that failed have no vote; a question fails if all of them did.

    Args:
        rationales: of the policy whose cost the row bears; None in rows without one.
        own: whether the rationales shown are that policy's own, unchanged.
        cached: requests that the cache answered.
        seconds: of the frozen LM, to which those of the rationales are added.
    """
    replies = [one.reply for one in attempts]
    there = [one for one in attempts if not isinstance(one.reply, Failure)]
    failures = [one for one in replies if isinstance(one, Failure)]
    found = vote([one.answer for one in there])
    picked = (there or attempts)[found.winner or 0]
    completions = [one for one in replies if isinstance(one, Completion)]
    several = len(attempts) > 1
    context = [" ".join(one.sentences) for one in example.context]
    return Prediction(
        id=example.id,
        question=example.question,
        gold=example.answer,
        type=example.type,
        level=example.level,
        rationale=picked.rationale,
        reply=picked.reply.text if isinstance(picked.reply, Completion) else "",
        answer=found.answer if several else picked.answer,
        em=exact_match(picked.answer, example.answer) if there else 0.0,
        f1=f1(picked.answer, example.answer) if there else 0.0,
        inclusion=inclusion(picked.answer, example.answer) if there else 0.0,
        contains_gold=contains_gold(picked.rationale, example.answer) if own else None,
        copied=copied_share(picked.rationale, context) if own else None,
        votes=[_vote(one) for one in attempts] if several else [],
        share=found.share if several else 1.0,
        large_lm_tokens_in=sum(one.tokens_in for one in completions),
        large_lm_tokens_out=sum(one.tokens_out for one in completions),
        small_lm_tokens_in=rationales.tokens_in if rationales else 0,
        small_lm_tokens_out=sum(rationales.tokens_out) if rationales else 0,
        requests=sum(one is not None for one in replies),
        cached_requests=cached,
        seconds=seconds + (rationales.seconds if rationales else 0.0),
        failure=failures[0].reason if failures and not there else None,
    )


def _vote(one: Attempt) -> dict[str, str]:
    reply = one.reply
    said = reply.text if isinstance(reply, Completion) else reply.reason if reply else ""
    return {"rationale": one.rationale, "reply": said, "answer": one.answer}


def row_result(
    row: str,
    label: str,
    predictions: Sequence[Prediction],
    *,
    large: int | None,
    small: int,
) -> RowResult:
    """Adds up a row; questions that failed are left out of its scores.

    Args:
        large, small: parameters of the frozen and of the small LM; None where unknown.
    """
    scored = [p for p in predictions if p.failure is None]
    return RowResult(
        name=row,
        label=label,
        ids=[p.id for p in scored],
        types=[p.type for p in scored],
        levels=[p.level for p in scored],
        em=[p.em for p in scored],
        f1=[p.f1 for p in scored],
        inclusion=[p.inclusion for p in scored],
        contains_gold=[float(p.contains_gold) for p in scored if p.contains_gold is not None],
        copied=[p.copied for p in scored if p.copied is not None],
        shares=[p.share for p in scored if p.votes],
        asked=len(predictions),
        large_lm_tokens_in=sum(p.large_lm_tokens_in for p in predictions),
        large_lm_tokens_out=sum(p.large_lm_tokens_out for p in predictions),
        small_lm_tokens_in=sum(p.small_lm_tokens_in for p in predictions),
        small_lm_tokens_out=sum(p.small_lm_tokens_out for p in predictions),
        requests=sum(p.requests for p in predictions),
        cached_requests=sum(p.cached_requests for p in predictions),
        large=large,
        small=small,
        seconds=sum(p.seconds for p in predictions),
    )


class Kept:
    """A file of records, one JSON line for each question, that grows while work goes on.

    A line is on disk when `add` returns; one that a kill cut short is dropped. Lines that were
    made with other settings or weights are dropped too: results are never mixed.
    """

    def __init__(self, path: Path, mark: str) -> None:
        """Reads what is there.

        Args:
            mark: names what the records depend on.
        """
        self.path = path
        self.dropped = 0
        """Lines that were made with something else."""
        self._mark = mark
        self.records: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
                made_with, key = record.pop("made_with"), record["id"]
            except (ValueError, KeyError, TypeError):
                continue
            if made_with == mark:
                self.records[key] = record
            else:
                self.dropped += 1
        if len(lines) != len(self.records):
            self.finish(list(self.records))

    def add(self, records: Iterable[Any], **changes: Any) -> None:
        """Appends records (dataclasses with an ``id``), some of their fields changed."""
        found = [asdict(one) | changes for one in records]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write("".join(map(self._line, found)).encode())
        self.records.update({one["id"]: one for one in found})

    def finish(self, order: Sequence[str]) -> None:
        """Puts the lines of these questions into their order; drops all others."""
        self.records = {key: self.records[key] for key in order if key in self.records}
        write_atomically(self.path, "".join(map(self._line, self.records.values())))

    def _line(self, record: dict[str, Any]) -> str:
        return json.dumps({**record, "made_with": self._mark}, ensure_ascii=False) + "\n"
