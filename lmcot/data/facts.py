"""Rationales made of a question's supporting facts, for the teacher and for demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lmcot.config import SupportingFactsTeacher
from lmcot.records import Example
from lmcot.text.answers import contains_gold, inclusion
from lmcot.text.content import content_words

_ANSWER: Final = 2
"""The need of a sentence that holds the answer."""


@dataclass(frozen=True, slots=True)
class FactsRationale:
    """A rationale made of supporting facts."""

    text: str
    left_out: int
    """Number of supporting facts that were left out to make it fit."""
    complete: bool
    """Whether each gold paragraph still has a sentence in it."""
    fits: bool
    """Whether it is short enough."""


@dataclass(frozen=True, slots=True)
class _Fact:
    """A supporting fact's sentence."""

    place: int
    """Its place among the supporting facts, in the order of the context."""
    title: str
    """The title of its paragraph."""
    text: str
    need: tuple[int, int]
    """How much the answer needs it: the kind of need, then the number of words that it shares with
    the question, without those of its title."""


def facts_rationale(
    example: Example, teacher: SupportingFactsTeacher, fits: Callable[[str], bool]
) -> FactsRationale:
    """The supporting facts of a question and its answer.

    If it does not fit and the settings say so, sentences are left out until it does. One sentence
    of each gold paragraph is needed: one that holds the answer, otherwise one that names the title
    of another gold paragraph or a title that the question names. Of the others, as many stay as
    fit: first those that hold the answer, then those that name such a title, then those that share
    most words with the question. Where even the needed ones do not fit, the sentence that holds
    the answer is enough, unless the question compares: the answer is yes or no, or a name that the
    question holds.
    """
    facts = _facts(example)

    def text(some: Sequence[_Fact]) -> str:
        in_order = sorted(some, key=lambda fact: fact.place)
        told = _with_titles(in_order) if teacher.titles else [fact.text for fact in in_order]
        return teacher.rationale(" ".join(told), example.answer)

    whole = text(facts)
    if fits(whole) or not teacher.shorten:
        return FactsRationale(whole, 0, True, fits(whole))
    for needed in (_of_each_paragraph(facts), _with_the_answer(facts)):
        if not needed or not fits(text(needed)):
            continue
        kept = list(needed)
        for fact in sorted(facts, key=_by_need):
            if fact not in kept and fits(text([*kept, fact])):
                kept.append(fact)
        complete = {fact.title for fact in kept} == {fact.title for fact in facts}
        return FactsRationale(text(kept), len(facts) - len(kept), complete, True)
    return FactsRationale(whole, 0, True, False)


def _facts(example: Example) -> list[_Fact]:
    wanted = {(fact.title, fact.sent_id) for fact in example.supporting_facts}
    pointed = (
        (paragraph.title, sentence.strip())
        for paragraph in example.context
        for index, sentence in enumerate(paragraph.sentences)
        if (paragraph.title, index) in wanted and sentence.strip()
    )
    told = (("", fact) for fact in example.facts)
    return [
        _Fact(place, title, text, _need(example, title, text))
        for place, (title, text) in enumerate((*pointed, *told))
    ]


def _with_titles(facts: Sequence[_Fact]) -> list[str]:
    """The sentences; before a paragraph's first one stands the title, unless that names it."""
    told: list[str] = []
    for before, fact in zip([None, *facts], facts, strict=False):
        first = fact.title != "" and (before is None or before.title != fact.title)
        named = content_words(fact.title).keys() & content_words(fact.text).keys()
        told.append(f"{fact.title}: {fact.text}" if first and not named else fact.text)
    return told


def _need(example: Example, title: str, sentence: str) -> tuple[int, int]:
    named = content_words(title).keys()
    asked = {word for word in content_words(example.question) if word not in named}
    shared = len(asked & content_words(sentence).keys())
    if contains_gold(example.question, example.answers):
        return (
            0,
            shared,
        )  # it compares: sentences that hold its answer, or the other name, say little
    if contains_gold(sentence, example.answers):
        return _ANSWER, shared
    gold = {fact.title for fact in example.supporting_facts}
    bridges = [
        one.title
        for one in example.context
        if one.title != title and (one.title in gold or _names(example.question, one.title))
    ]
    return int(any(_names(sentence, bridge) for bridge in bridges)), shared


def _by_need(fact: _Fact) -> tuple[int, int, int]:
    """A key that sorts the most needed facts first, and of equals the earlier one."""
    return (-fact.need[0], -fact.need[1], fact.place)


def _names(text: str, title: str) -> bool:
    """Whether a text holds a title, without what tells it from others: ``Velm (town)``."""
    return inclusion(text, title.split(" (")[0]) == 1.0


def _of_each_paragraph(facts: Sequence[_Fact]) -> list[_Fact]:
    """The fact of each gold paragraph that the answer needs most."""
    most: dict[str, _Fact] = {}
    for fact in sorted(facts, key=_by_need):
        most.setdefault(fact.title, fact)
    return list(most.values())


def _with_the_answer(facts: Sequence[_Fact]) -> list[_Fact]:
    """The fact that holds the answer; none if no fact shows it."""
    return [fact for fact in sorted(facts, key=_by_need) if fact.need[0] == _ANSWER][:1]
