"""Selects the part of a question's context that the models see: distractors, token budget, text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lmcot.config import ContextSettings
from lmcot.records import Example, Paragraph

CountTokens = Callable[[str], int]
_LONGEST_WORD = 40
"""A longer run without white space is not a word: such languages are cut at any character."""


def apply_context(
    examples: Iterable[Example], settings: ContextSettings, count_tokens: CountTokens
) -> list[Example]:
    """The examples with their contexts reduced by `select_context`.

    Supporting facts that no longer point at a sentence drop out; text is cut from the ends of
    paragraphs only, so the others stay right. Whether gold text was lost shows in
    ``example.gold_sentences()`` before and after.
    """
    return [
        _reduced(example, select_context(example, settings, count_tokens)) for example in examples
    ]


def select_context(
    example: Example, settings: ContextSettings, count_tokens: CountTokens
) -> tuple[Paragraph, ...]:
    """The paragraphs to show, in their original order, within ``settings.max_tokens``.

    First the paragraphs are chosen: the gold ones, whose titles the supporting facts name, and
    the first ``settings.distractors`` others. An example without supporting facts in its context
    keeps all paragraphs. Then, if ``render_context`` of these takes more than
    ``settings.max_tokens``, whole sentences are taken from the fronts of the paragraphs in turn,
    while they fit; a paragraph is closed at its first sentence that does not fit.

    A sentence of a gold paragraph that is longer than the whole budget is taken piece by piece,
    like sentences, and so may end within itself: between words, or between characters where there
    are none. Without supporting facts, so is any such sentence. If nothing fits, the beginning of
    the first gold sentence is shown, else that of the context.
    """
    chosen = _choose(example, settings)
    budget = settings.max_tokens
    if count_tokens(render_context(chosen)) <= budget:
        return chosen
    taken = _take_in_turn(example, chosen, budget, count_tokens)
    selected = _cut(chosen, taken)
    # Tokens of parts do not quite add up to tokens of the whole: the whole decides.
    while taken and count_tokens(render_context(selected)) > budget:
        taken.pop()
        selected = _cut(chosen, taken)
    return selected or _beginning(example, chosen, budget, count_tokens)


def render_context(paragraphs: Sequence[Paragraph]) -> str:
    """The paragraphs as text, each on a line of its own: ``Title: sentence sentence``."""
    return "\n".join(_title(p) + " ".join(_texts(p)) for p in paragraphs if _texts(p))


def _choose(example: Example, settings: ContextSettings) -> tuple[Paragraph, ...]:
    titles = {fact.title for fact in example.supporting_facts}
    gold = {index for index, p in enumerate(example.context) if p.title in titles}
    if settings.distractors == "all" or not gold:
        return example.context
    others = [index for index in range(len(example.context)) if index not in gold]
    shown = gold.union(others[: settings.distractors])
    return tuple(p for index, p in enumerate(example.context) if index in shown)


@dataclass(slots=True)
class _Front:
    """How far the text of one paragraph is taken."""

    index: int
    """Index of the paragraph."""
    lead: str
    """Text before its first sentence."""
    sentences: list[tuple[int, str]]
    """Sentences that are not taken yet, each with its index in the paragraph."""
    may_end_within: bool
    """Whether a sentence that is longer than the whole budget may be cut."""
    offset: int = 0
    """How many characters of the first of them are taken."""


_Taken = tuple[int, int, int | None]
"""The indices of a paragraph and of a sentence in it, and where that ends; None: at its end."""


def _take_in_turn(
    example: Example, paragraphs: Sequence[Paragraph], budget: int, count_tokens: CountTokens
) -> list[_Taken]:
    """The sentences to keep, in the order in which they are taken."""
    wanted = {fact.title for fact in example.supporting_facts}
    gold = {paragraph.title for paragraph in paragraphs} & wanted
    fronts = [
        _Front(
            index,
            "\n" + _title(paragraph),
            [(i, s.strip()) for i, s in enumerate(paragraph.sentences) if s.strip()],
            not gold or paragraph.title in gold,
        )
        for index, paragraph in enumerate(paragraphs)
    ]
    fronts = [front for front in fronts if front.sentences]
    share = budget // max(1, len(fronts))
    taken: list[_Taken] = []
    spent = 0
    while fronts:
        still_open = []
        for front in fronts:
            found = _take(front, budget, spent, share, count_tokens)
            if found is None:
                continue
            one, cost = found
            spent += cost
            taken.append(one)
            if front.sentences:
                still_open.append(front)
        fronts = still_open
    return taken


def _take(
    front: _Front, budget: int, spent: int, share: int, count_tokens: CountTokens
) -> tuple[_Taken, int] | None:
    """The next sentence, or a part of one that is longer than the budget; None if none fits."""
    place, text = front.sentences[0]
    if not front.offset:
        cost = count_tokens(front.lead + text)
        if spent + cost <= budget:
            front.sentences.pop(0)
            front.lead = " "
            return (front.index, place, None), cost
        if cost <= budget or not front.may_end_within:
            return None
    part = text[front.offset :]
    end = _fitting(part, min(share, budget - spent), count_tokens, front.lead)
    if not end:
        return None
    cost = count_tokens(front.lead + part[:end])
    front.offset += end
    front.lead = ""
    if front.offset < len(text):
        return (front.index, place, front.offset), cost
    front.sentences.pop(0)
    front.lead, front.offset = " ", 0
    return (front.index, place, None), cost


def _fitting(text: str, budget: int, count_tokens: CountTokens, lead: str) -> int:
    """The length of the longest prefix that fits with the text before it, by bisection.

    It ends before white space, or between any characters where there is none nearby.
    """

    def fits(length: int) -> bool:
        return count_tokens(lead + text[:length]) <= budget

    low, high = 0, 1
    while high < len(text) and fits(high):
        low, high = high, 2 * high
    high = min(high, len(text))
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0 or text[low].isspace():
        return low
    space = max(
        (i for i in range(max(1, low - _LONGEST_WORD), low) if text[i].isspace()), default=0
    )
    return space or _between_characters(text, low)


def _between_characters(text: str, end: int) -> int:
    """The nearest position before ``end`` that does not separate a letter from its marks."""
    while end and (
        unicodedata.category(text[end])[0] == "M" or "\u200d" in text[end - 1 : end + 1]
    ):
        end -= 1
    return end


def _beginning(
    example: Example, paragraphs: Sequence[Paragraph], budget: int, count_tokens: CountTokens
) -> tuple[Paragraph, ...]:
    """The part of one sentence that fits: a gold one if possible, without a title if necessary."""
    wanted = {(fact.title, fact.sent_id) for fact in example.supporting_facts}
    found = [
        (paragraph, index)
        for paragraph in paragraphs
        for index, sentence in enumerate(paragraph.sentences)
        if sentence.strip()
    ]
    gold = [(one, index) for one, index in found if (one.title, index) in wanted]
    for paragraph, index in (gold or found)[:1]:
        text = paragraph.sentences[index].strip()
        for title in dict.fromkeys((_title(paragraph), "")):
            end = _fitting(text, budget, count_tokens, title)
            if end:
                before = ("",) * index
                return (Paragraph(paragraph.title if title else "", (*before, text[:end])),)
    return ()


def _cut(paragraphs: Sequence[Paragraph], taken: Sequence[_Taken]) -> tuple[Paragraph, ...]:
    last = {index: (sentence, end) for index, sentence, end in taken}
    return tuple(
        replace(paragraph, sentences=_up_to(paragraph.sentences, *last[index]))
        for index, paragraph in enumerate(paragraphs)
        if index in last
    )


def _up_to(sentences: tuple[str, ...], last: int, end: int | None) -> tuple[str, ...]:
    if end is None:
        return sentences[: last + 1]
    return (*sentences[:last], sentences[last].strip()[:end].rstrip())


def _reduced(example: Example, context: tuple[Paragraph, ...]) -> Example:
    there = {(p.title, index) for p in context for index in range(len(p.sentences))}
    facts = tuple(f for f in example.supporting_facts if (f.title, f.sent_id) in there)
    return replace(example, context=context, supporting_facts=facts)


def _title(paragraph: Paragraph) -> str:
    return f"{paragraph.title}: " if paragraph.title else ""


def _texts(paragraph: Paragraph) -> list[str]:
    return [sentence.strip() for sentence in paragraph.sentences if sentence.strip()]
