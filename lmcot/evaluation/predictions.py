"""The outcome of each question in a row, and the sums over a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmcot.config.rows import find_row
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.evaluation.report import RowResult
from lmcot.records import Answer, Example, Failure, Missing
from lmcot.run.first_answers import FirstAnswer
from lmcot.text.copying import copied_share
from lmcot.text.vote import vote

_NEARLY_ALL = 0.95
_ENOUGH = 10
"""Answers that are not alike by chance."""
"""Share of questions with identical votes from which on the report says so."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question's outcome in one row; scores and shares are 0 to 1."""

    id: str
    question: str
    gold: str
    type: str
    level: str
    rationale: str
    """The rationale that the frozen LM read; of several, one that led to the answer."""
    reply: str
    """The frozen LM's reply; empty if it was not asked."""
    answer: str
    """The answer read out of the reply (of the rationale, where the small LM answers alone)."""
    em: float
    f1: float
    inclusion: float
    contains_gold: bool | None
    """Whether the small LM's rationale holds the gold answer; None without such a rationale."""
    copied: float | None
    """Share of that rationale's words that are copied from the context (`copied_share`); None
    without a context."""
    votes: list[dict[str, str]]
    """Votes of a ``+sc`` row, each ``{"rationale", "reply", "answer"}``."""
    share: float
    """Share of the votes that are for the answer."""
    large_lm_tokens_in: int
    large_lm_tokens_out: int
    small_lm_tokens_in: int
    small_lm_tokens_out: int
    requests: int
    cached_requests: float
    """Requests that the frozen LM's cache answered; their tokens count all the same."""
    seconds: float
    """Seconds that the question took; questions that arrived together share theirs equally."""
    failure: str | None
    golds: list[str] = field(default_factory=list)
    """All right answers, the main one first; each score is the best over them."""
    missing: Missing = ""
    """Why there is no answer: ``empty``, or ``cut`` by a limit of tokens before it was said."""
    estimated: bool = False
    """Whether tokens of the frozen LM were estimated, since its endpoint does not count them."""
    thought: bool = False
    """Whether the reply is nothing but hidden thinking."""
    first_answer: str = ""
    """What the frozen LM answered first, where the small LM advises on that."""


@dataclass(frozen=True, slots=True)
class Rationales:
    """The rationales that one policy wrote for a question."""

    id: str
    texts: list[str]
    tokens_in: int
    """Tokens of the prompt, which is read once for all rationales."""
    tokens_out: list[int]
    finish_reasons: list[str]
    seconds: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way from a question to an answer."""

    rationale: str
    """The rationale that was shown to the frozen LM; empty if none was."""
    answer: Answer | Failure
    """What the frozen LM replied; where the small LM answers alone, its answer without a reply."""


def predict(
    example: Example,
    attempts: Sequence[Attempt],
    rationales: Rationales | None,
    *,
    own: bool,
    cached: float,
    seconds: float,
    asked: bool = True,
    task: Task = EXTRACTIVE_QA,
    first: FirstAnswer | None = None,
) -> Prediction:
    """Scores one question by its only attempt, or by the vote of several.

    An attempt that failed has no vote; a question fails if all of its attempts did. An attempt
    whose rationale or reply was cut before its answer was said counts only if no other has a vote.

    Args:
        rationales: of the policy whose cost the row bears; None in rows without one.
        own: whether the rationales shown are that policy's own, unchanged.
        cached: how many requests the frozen LM's cache answered.
        seconds: of the frozen LM; those of the rationales are added.
        asked: whether the frozen LM was asked at all, once for each attempt.
        task: how answers are compared.
        first: the frozen LM's first answer, whose cost is added.
    """
    there = [(at, one, one.answer) for at, one in enumerate(attempts)
             if isinstance(one.answer, Answer)]  # fmt: skip
    failures = [one.answer.reason for one in attempts if isinstance(one.answer, Failure)]
    found = vote(
        [said.extracted for _, _, said in there],
        [_is_cut(at, said, rationales if own else None, example, task) for at, _, said in there],
        task.key,
    )
    shown, said = attempts[0].rationale, Answer("", "", 0, 0)
    if there:
        _, picked, said = there[found.winner or 0]
        shown = picked.rationale
    scores = task.scores(said.extracted, example)
    several = len(attempts) > 1
    context = [" ".join(one.sentences) for one in example.context]
    return Prediction(
        id=example.id,
        question=example.question,
        gold=example.answer,
        type=example.type,
        level=example.level,
        rationale=shown,
        reply=said.text,
        answer=found.answer if several else said.extracted,
        em=scores.em,
        f1=scores.f1,
        inclusion=scores.inclusion,
        contains_gold=task.contains(shown, example) if own else None,
        copied=copied_share(shown, context) if own and context else None,
        votes=[_vote(one) for one in attempts] if several else [],
        share=found.share if several else 1.0,
        large_lm_tokens_in=sum(said.tokens_in for _, _, said in there)
        + (first.tokens_in if first else 0),
        large_lm_tokens_out=sum(said.tokens_out for _, _, said in there)
        + (first.tokens_out if first else 0),
        small_lm_tokens_in=rationales.tokens_in if rationales else 0,
        small_lm_tokens_out=sum(rationales.tokens_out) if rationales else 0,
        requests=(len(attempts) if asked else 0) + (1 if first else 0),
        cached_requests=cached + (first.cached if first else 0.0),
        seconds=seconds
        + (rationales.seconds if rationales else 0.0)
        + (first.seconds if first else 0.0),
        failure=failures[0] if failures and not there else None,
        estimated=any(said.estimated for _, _, said in there)
        or (first is not None and first.estimated),
        golds=list(example.answers),
        # A right answer was said, wherever the reply was cut.
        missing="" if scores.em == 1 else said.missing,
        thought=bool(said.silent),
        first_answer=first.text if first else "",
    )


def _is_cut(
    number: int, said: Answer, rationales: Rationales | None, example: Example, task: Task
) -> bool:
    """Whether an attempt's answer may be half of one.

    Args:
        number: of the attempt.
        rationales: that the attempts rest on, in their order; None if they rest on others.
    """
    if said.missing == "cut":
        return True
    if rationales is None or rationales.finish_reasons[number] != "length":
        return False
    return task.read(rationales.texts[number], example.question, cut=True).missing == "cut"


def _vote(one: Attempt) -> dict[str, str]:
    said = one.answer
    if isinstance(said, Failure):
        return {"rationale": one.rationale, "reply": said.reason, "answer": ""}
    return {"rationale": one.rationale, "reply": said.text, "answer": said.extracted}


def row_result(
    row: str,
    label: str,
    predictions: Sequence[Prediction],
    *,
    large: int | None,
    small: int,
) -> RowResult:
    """The sums over a row; questions that failed are left out of its scores.

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
        empty=sum(p.missing == "empty" for p in scored),
        cut=sum(p.missing == "cut" for p in scored),
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


def lacking_answers(row: str, predictions: Sequence[Prediction]) -> str:
    """A note on the questions of a row that lack answers, with remedies; empty if none does."""
    scored = [p for p in predictions if p.failure is None]
    empty = sum(p.missing == "empty" for p in scored)
    cut = sum(p.missing == "cut" for p in scored)
    if not (empty or cut):
        return ""
    remedies = dict.fromkeys(_remedy(row, one) for one in scored if one.missing)
    return (
        f"{row}: {empty + cut} of {len(scored)} questions count as wrong for want of an answer "
        f"({empty} empty, {cut} cut before it was said): {'; '.join(remedies)}"
    )


def _remedy(row: str, one: Prediction) -> str:
    """The remedy for a question without an answer."""
    alone = find_row(row).prompt is None
    if one.thought:
        return (
            "raise frozen.max_thinking_tokens or switch the model's thinking off (some replies "
            "are nothing but hidden thinking)"
        )
    if not (one.rationale if alone else one.reply).strip():
        model = "policy.source" if alone else "the frozen LM"
        return (
            f"check that {model} and prompts.templates fit each other (some replies hold no word, "
            "only special tokens or blanks)"
        )
    if one.missing == "empty":
        return f"look at the replies in predictions/{row}.jsonl"
    if alone:
        return "raise policy.max_new_tokens"
    limit = "max_rationale_tokens" if find_row(row).prompt == "cot" else "max_answer_tokens"
    return f"raise frozen.{limit} (frozen.max_thinking_tokens if it thinks first)"


def alike_votes(row: str, predictions: Sequence[Prediction]) -> str:
    """A note on a row whose votes hardly ever differ; empty if they differ, or without votes."""
    voted = [p for p in predictions if p.failure is None and p.votes]
    alike = sum(len({tuple(sorted(one.items())) for one in p.votes}) == 1 for p in voted)
    if not voted or alike < _NEARLY_ALL * len(voted):
        return ""
    frozen = find_row(row).samples_replies
    sampled = "frozen LM" if frozen else "small LM"
    other = " (some servers ignore the temperature)" if frozen else ""
    return (
        f"{row}: for {alike} of {len(voted)} questions all votes are the same, word for word, so "
        f"the vote says no more than a single reply: either the {sampled} is that sure, or it is "
        f"greedy at evaluate.temperature{other}"
    )


def one_answer(row: str, predictions: Sequence[Prediction]) -> str:
    """A note on a row that answers all questions alike, where they have several right answers;
    empty if its answers differ, or are too few to tell."""
    answered = [p for p in predictions if p.failure is None and p.answer]
    alike = len(answered) >= _ENOUGH and len({p.answer.casefold() for p in answered}) == 1
    if not alike or len({p.gold.casefold() for p in answered}) == 1:
        return ""
    return (
        f"{row}: all {len(answered)} answers are '{answered[0].answer}', so its score is the share "
        "of questions of which that is right, whatever the model was shown"
    )
