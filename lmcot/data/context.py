"""What of a question's context the models get to see: distractors, token budget, text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from lmcot.config import ContextSettings
from lmcot.records import Example, Paragraph

CountTokens = Callable[[str], int]


def apply_context(
    examples: Iterable[Example], settings: ContextSettings, count_tokens: CountTokens
) -> list[Example]:
    """The examples with their contexts reduced by `select_context`.

    Supporting facts that no longer point at a sentence drop out; sentences are cut from the ends
    of paragraphs only, so the others stay right. Whether gold text was lost shows in
    ``len(example.gold_sentences())`` before and after.
    """
    return [
        _reduced(example, select_context(example, settings, count_tokens)) for example in examples
    ]


def select_context(
    example: Example, settings: ContextSettings, count_tokens: CountTokens
) -> tuple[Paragraph, ...]:
    """The paragraphs to show, in their original order.

    First the paragraphs are chosen: the gold ones, whose titles the supporting facts name, and
    the first ``settings.distractors`` others. An example without supporting facts in its context
    keeps all paragraphs. Then, if ``render_context`` of these takes more than
    ``settings.max_tokens``, whole sentences are taken from the fronts of the paragraphs in turn,
    while they fit; a paragraph is closed at its first sentence that does not fit. One sentence is
    kept in any case: if none fits, the first of the context, whatever it takes.
    """
    chosen = _choose(example, settings)
    if count_tokens(render_context(chosen)) <= settings.max_tokens:
        return chosen
    taken = _take_in_turn(chosen, settings.max_tokens, count_tokens)
    selected = _cut(chosen, taken)
    # Tokens of parts do not quite add up to tokens of the whole: the whole decides.
    while len(taken) > 1 and count_tokens(render_context(selected)) > settings.max_tokens:
        taken.pop()
        selected = _cut(chosen, taken)
    return selected


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


def _take_in_turn(
    paragraphs: Sequence[Paragraph], budget: int, count_tokens: CountTokens
) -> list[tuple[int, int]]:
    """Pairs of a paragraph's index and how many of its sentences to keep, in order of taking."""
    # An empty sentence costs nothing and goes with the sentence after it.
    ends = [[i for i, s in enumerate(p.sentences, 1) if s.strip()] for p in paragraphs]
    open_ones = [index for index, end in enumerate(ends) if end]
    taken: list[tuple[int, int]] = []
    spent, turn = 0, 0
    while open_ones:
        still_open = []
        for index in open_ones:
            paragraph, end = paragraphs[index], ends[index][turn]
            lead = ("\n" + _title(paragraph)) if turn == 0 else " "
            cost = count_tokens(lead + paragraph.sentences[end - 1].strip())
            if spent + cost > budget:
                continue
            spent += cost
            taken.append((index, end))
            if turn + 1 < len(ends[index]):
                still_open.append(index)
        open_ones, turn = still_open, turn + 1
    first = next(((index, end[0]) for index, end in enumerate(ends) if end), None)
    return taken or ([first] if first else [])


def _cut(
    paragraphs: Sequence[Paragraph], taken: Sequence[tuple[int, int]]
) -> tuple[Paragraph, ...]:
    keep = dict(taken)
    return tuple(
        replace(paragraph, sentences=paragraph.sentences[: keep[index]])
        for index, paragraph in enumerate(paragraphs)
        if index in keep
    )


def _reduced(example: Example, context: tuple[Paragraph, ...]) -> Example:
    there = {(p.title, index) for p in context for index in range(len(p.sentences))}
    facts = tuple(f for f in example.supporting_facts if (f.title, f.sent_id) in there)
    return replace(example, context=context, supporting_facts=facts)


def _title(paragraph: Paragraph) -> str:
    return f"{paragraph.title}: " if paragraph.title else ""


def _texts(paragraph: Paragraph) -> list[str]:
    return [sentence.strip() for sentence in paragraph.sentences if sentence.strip()]
