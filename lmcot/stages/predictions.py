"""Predictions of single questions: one JSON line each, and what a row adds up to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lmcot.config import Row
from lmcot.files import write_atomically
from lmcot.monitor.report import RowResult
from lmcot.records import Completion, Example, Failure, Rollout
from lmcot.rewards.answers import exact_match, f1, inclusion

_LABELS = {
    "standard": "frozen LM answers at once",
    "cot": "frozen LM reasons, then answers",
    "guided_base": "guided by the untrained small LM",
    "guided_distilled": "guided by the distilled small LM",
    "guided_refined": "guided by the small LM after PPO",
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question's outcome in one row; scores are 0 to 1."""

    id: str
    question: str
    gold: str
    rationale: str
    reply: str
    """What the frozen LM wrote; empty where it was not asked."""
    answer: str
    """The answer read out of the reply (of the rationale, where the small LM answers alone)."""
    em: float
    f1: float
    inclusion: float
    large_lm_tokens_in: int
    large_lm_tokens_out: int
    small_lm_tokens_in: int
    small_lm_tokens_out: int
    requests: int
    seconds: float
    """The row's seconds, shared out evenly."""
    failure: str | None


def predict(
    examples: Sequence[Example],
    rationales: Sequence[Rollout],
    replies: Sequence[Completion | Failure | None],
    answers: Sequence[str],
    seconds: float,
) -> list[Prediction]:
    """Scores a row's answers.

    Args:
        rationales: one for each example, or none at all in rows without a small LM.
        replies: None where the frozen LM was not asked.
        seconds: of the whole row.
    """
    predictions = []
    for index, (example, reply, answer) in enumerate(zip(examples, replies, answers, strict=True)):
        rollout = rationales[index] if rationales else None
        done = reply if isinstance(reply, Completion) else None
        predictions.append(
            Prediction(
                id=example.id,
                question=example.question,
                gold=example.answer,
                rationale=rollout.text if rollout else "",
                reply=done.text if done else "",
                answer=answer,
                em=exact_match(answer, example.answer),
                f1=f1(answer, example.answer),
                inclusion=inclusion(answer, example.answer),
                large_lm_tokens_in=done.tokens_in if done else 0,
                large_lm_tokens_out=done.tokens_out if done else 0,
                small_lm_tokens_in=len(rollout.prompt_ids) if rollout else 0,
                small_lm_tokens_out=len(rollout.response_ids) if rollout else 0,
                requests=int(reply is not None),
                seconds=seconds / len(examples),
                failure=reply.reason if isinstance(reply, Failure) else None,
            )
        )
    return predictions


def row_result(
    row: Row,
    predictions: Sequence[Prediction],
    most_trained: str,
    *,
    large: int | None,
    small: int,
) -> RowResult:
    """Adds up a row; questions that failed are left out of its scores.

    FLOPs are estimated as 2 per parameter and token, read or written (Kaplan et al. 2020,
    section 2.1; attention left out).

    Args:
        most_trained: which policy ``small_alone`` stands for.
        large, small: parameters of the frozen and of the small LM; None where unknown.
    """
    scored = [p for p in predictions if p.failure is None]
    large_in = sum(p.large_lm_tokens_in for p in predictions)
    large_out = sum(p.large_lm_tokens_out for p in predictions)
    small_in = sum(p.small_lm_tokens_in for p in predictions)
    small_out = sum(p.small_lm_tokens_out for p in predictions)
    large_tokens = large_in + large_out
    flops = None
    if large is not None or large_tokens == 0:
        flops = 2.0 * ((large or 0) * large_tokens + small * (small_in + small_out))
    return RowResult(
        name=row,
        label=_LABELS.get(row, f"the {most_trained} small LM answers itself"),
        em=[p.em for p in scored],
        f1=[p.f1 for p in scored],
        inclusion=[p.inclusion for p in scored],
        large_lm_tokens_in=large_in,
        large_lm_tokens_out=large_out,
        small_lm_tokens_in=small_in,
        small_lm_tokens_out=small_out,
        requests=sum(p.requests for p in predictions),
        flops=flops,
        seconds=sum(p.seconds for p in predictions),
    )


def write_predictions(path: Path, predictions: Sequence[Prediction], mark: str) -> None:
    """One JSON line a question; ``mark`` names what they were made with."""
    lines = [json.dumps({**asdict(p), "made_with": mark}, ensure_ascii=False) for p in predictions]
    write_atomically(path, "\n".join(lines) + "\n")


def read_predictions(path: Path, mark: str) -> list[Prediction]:
    """The predictions of a file, if they were made with the same settings and weights."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if any(line.pop("made_with") != mark for line in lines):
        return []
    return [Prediction(**line) for line in lines]
