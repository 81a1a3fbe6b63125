"""One request's way through both models: rationales, the answers that they lead to, the vote."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from lmcot.answering.exchange import (
    Answerer,
    Draw,
    Piece,
    Query,
    Reply,
    Shown,
    Wish,
    Writer,
    Written,
)
from lmcot.answering.refused import FrozenLMFailed, Refused, UnfitAnswer
from lmcot.answering.schemas import AnswerResponse, Timings, Tokens, Versions, Vote
from lmcot.answering.structured import Form
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.records import Failure, Paragraph
from lmcot.text.vote import vote


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request, with all defaults filled in."""

    id: str
    question: str
    context: tuple[Paragraph, ...]
    draw: Draw
    unguided: bool = False
    wish: Wish = field(default_factory=Wish)
    form: Form | None = None
    """The JSON object that holds the answer, if one is wanted."""
    task: Task = EXTRACTIVE_QA
    """How answers are read and compared."""
    advises: bool = False
    """Whether the frozen LM answers first, and the small LM advises on that."""


async def answer_first(
    question: str, context: Sequence[Paragraph], small: Writer, frozen: Answerer
) -> tuple[tuple[Paragraph, ...], Reply]:
    """The part of the context that the models read, and the frozen LM's first answer.

    Raises:
        FrozenLMFailed: if it gave none.
    """
    paragraphs = await small.fit_context(question, context)
    reply = await frozen.answer_first(Query(question, paragraphs, None))
    if reply.failure is not None:
        raise FrozenLMFailed(reply.failure)
    return paragraphs, reply


async def guide(
    ask: Ask, small: Writer, frozen: Answerer
) -> AsyncGenerator[Piece | Written | AnswerResponse, None]:
    """Pieces of the rationales as they come, each finished rationale, and at last the answer.

    The frozen LM is asked about a rationale as soon as it is written, while others are still being
    written. Closing the iteration cancels what is in flight.

    Raises:
        Refused: if the small LM cannot read the question, the frozen LM fails, or the answer does
            not fit the form that it is to have.
    """
    started = time.monotonic()
    times: dict[str, float] = {}
    replies: dict[int, asyncio.Task[Reply]] = {}
    written: dict[int, Written] = {}
    plain: asyncio.Task[Reply] | None = None
    shown = Shown((), 0, "")
    context, first = ask.context, None
    if ask.advises:
        context, first = await answer_first(ask.question, ask.context, small, frozen)
    said = first.answer.text.strip() if first is not None else ""

    def answer(rationale: str | None) -> asyncio.Task[Reply]:
        query = Query(ask.question, shown.paragraphs, rationale, ask.wish, said)
        return asyncio.ensure_future(frozen.answer(query))

    try:
        async with aclosing(small.write(ask.question, context, ask.draw, said)) as told:
            async for one in told:
                if isinstance(one, Shown):
                    shown = one
                    plain = answer(None) if ask.unguided else None
                elif isinstance(one, Failure):
                    raise Refused(f"the small LM cannot read this: {one.reason}")
                elif isinstance(one, Piece):
                    times.setdefault("first_token", time.monotonic() - started)
                    yield one
                else:
                    written[one.sample] = one
                    replies[one.sample] = answer(one.text)
                    yield one
        times["rationale"] = time.monotonic() - started
        order = sorted(replies)
        found = [await replies[number] for number in order]
        unguided = await plain if plain is not None else None
    finally:
        for task in (*replies.values(), *([plain] if plain is not None else [])):
            task.cancel()
    response = _response(
        ask, [written[number] for number in order], found, unguided, shown,
        Timings(total=time.monotonic() - started, **times), first,
    )  # fmt: skip
    if ask.form is not None:
        response = await _formed(ask, ask.form, response, shown, frozen)
        response.timings.total = time.monotonic() - started
    yield response


async def _formed(
    ask: Ask, form: Form, response: AnswerResponse, shown: Shown, frozen: Answerer
) -> AnswerResponse:
    """Adds the answer as a JSON object.

    That is the frozen LM's reply if it is one, else the schema filled in where the answer has one
    place in it, else what the frozen LM writes when it is asked for the object.
    """
    said = next((one.reply for one in response.votes if one.answer == response.answer), "")
    found, _ = await asyncio.to_thread(form.read, said)
    if found is None:
        found = await asyncio.to_thread(form.filled, response.answer, response.rationale)
    if found is not None:
        return response.model_copy(update={"structured": found})
    query = Query(
        ask.question, shown.paragraphs, response.rationale, ask.wish, response.first_answer or ""
    )
    reply = await frozen.write_object(query, response.answer, form.text)
    if reply.failure is not None:
        raise FrozenLMFailed(reply.failure)
    found, reason = await asyncio.to_thread(form.read, reply.answer.text)
    if found is None and form.open and form.fault({"answer": response.answer}) is None:
        found = {"answer": response.answer}
    if found is None:
        end = "; it was cut at its longest length" if reply.cut else ""
        raise UnfitAnswer(
            f"the frozen LM wrote no JSON object that fits the schema ({reason}{end}): ask for "
            "fewer fields, or for one that is the answer"
        )
    tokens = response.tokens.model_copy(
        update={
            "large_lm_in": response.tokens.large_lm_in + reply.answer.tokens_in,
            "large_lm_out": response.tokens.large_lm_out + reply.answer.tokens_out,
        }
    )
    return response.model_copy(update={"structured": found, "tokens": tokens})


def _is_cut(rationale: Written, ask: Ask) -> bool:
    """Whether a rationale was cut before it stated its answer: its vote may be half an answer."""
    cut = rationale.finish_reason == "length"
    return cut and ask.task.read(rationale.text, ask.question, cut=True).missing == "cut"


def _response(
    ask: Ask,
    written: Sequence[Written],
    replies: Sequence[Reply],
    unguided: Reply | None,
    shown: Shown,
    timings: Timings,
    first: Reply | None,
) -> AnswerResponse:
    answered = [number for number, reply in enumerate(replies) if reply.failure is None]
    if not answered:
        raise FrozenLMFailed(replies[0].failure or "")
    if unguided is not None and unguided.failure is not None:
        raise FrozenLMFailed(unguided.failure)
    found = vote(
        [replies[number].answer.extracted for number in answered],
        [_is_cut(written[number], ask) for number in answered],
        ask.task.key,
    )
    winner = answered[found.winner or 0]
    votes = [
        Vote(
            rationale=one.text,
            answer=reply.answer.extracted,
            reply=reply.answer.text,
            tokens=Tokens(
                # The prompt is read once for all rationales.
                small_lm_in=shown.prompt_tokens if number == 0 else 0,
                small_lm_out=one.tokens,
                large_lm_in=reply.answer.tokens_in,
                large_lm_out=reply.answer.tokens_out,
            ),
            finish_reason=one.finish_reason,
            answer_cut=reply.cut,
            failure=reply.failure,
        )
        for number, (one, reply) in enumerate(zip(written, replies, strict=True))
    ]
    more = [one for one in (first, unguided) if one is not None]
    return AnswerResponse(
        id=ask.id,
        answer=found.answer,
        rationale=written[winner].text,
        rationale_cut=written[winner].finish_reason == "length",
        answer_cut=replies[winner].cut,
        confidence=found.share,
        votes=votes,
        unguided=unguided.answer.extracted if unguided is not None else None,
        first_answer=first.answer.text.strip() if first is not None else None,
        tokens=Tokens(
            small_lm_in=shown.prompt_tokens,
            small_lm_out=sum(one.tokens for one in written),
            large_lm_in=sum(one.answer.tokens_in for one in (*replies, *more)),
            large_lm_out=sum(one.answer.tokens_out for one in (*replies, *more)),
        ),
        timings=timings,
        versions=Versions(small=shown.version, frozen=replies[winner].version),
    )
