from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcot.config import ContextSettings, SampleData
from lmcot.data import apply_context, load_examples, render_context, select_context
from lmcot.records import Example, Paragraph, SupportingFact


def words(text: str) -> int:
    return len(text.split())


def example(*paragraphs: tuple[str, list[str]], gold: list[tuple[str, int]]) -> Example:
    context = tuple(Paragraph(title, tuple(sentences)) for title, sentences in paragraphs)
    facts = tuple(SupportingFact(title, index) for title, index in gold)
    return Example("x", "Why?", "so", context, facts)


FIVE = example(
    ("A", ["a0 a.", "a1 a.", "a2 a."]),
    ("B", ["b0 b.", "b1 b."]),
    ("C", ["c0 c."]),
    ("D", ["d0 d.", "d1 d."]),
    ("E", ["e0 e."]),
    gold=[("D", 1), ("B", 0)],
)


@pytest.mark.parametrize(
    ("distractors", "titles"),
    [(0, "BD"), (1, "ABD"), (2, "ABCD"), (3, "ABCDE"), (99, "ABCDE"), ("all", "ABCDE")],
)
def test_gold_and_the_first_distractors_in_order(distractors: int, titles: str) -> None:
    settings = ContextSettings.model_validate({"distractors": distractors})
    assert "".join(p.title for p in select_context(FIVE, settings, words)) == titles


@pytest.mark.parametrize("facts", [(), (SupportingFact("nowhere", 0),)])
def test_without_known_gold_all_paragraphs_stay(facts: tuple[SupportingFact, ...]) -> None:
    blind = replace(FIVE, supporting_facts=facts)
    assert select_context(blind, ContextSettings(distractors=0), words) == FIVE.context


def test_namesakes_of_a_gold_paragraph_are_gold() -> None:
    twins = example(("T", ["x."]), ("U", ["u."]), ("T", ["y."]), gold=[("T", 0)])
    chosen = select_context(twins, ContextSettings(distractors=0), words)
    assert chosen == (twins.context[0], twins.context[2])
    (reduced,) = apply_context([twins], ContextSettings(distractors="all", max_tokens=4), words)
    assert reduced.gold_sentences() == ("x.",)


def test_the_ends_of_paragraphs_go_first() -> None:
    """Titles cost a word, sentences two: 20 words hold the five fronts, and A's and B's second."""
    cut = select_context(FIVE, ContextSettings(max_tokens=20), words)
    assert {p.title: len(p.sentences) for p in cut} == {"A": 2, "B": 2, "C": 1, "D": 1, "E": 1}
    assert words(render_context(cut)) == 19


def test_a_paragraph_closes_at_a_sentence_that_does_not_fit() -> None:
    long = example(("A", ["a.", "l o n g e r.", "z."]), ("B", ["b.", "b."]), gold=[])
    cut = select_context(long, ContextSettings(max_tokens=6), words)
    assert [p.sentences for p in cut] == [("a.",), ("b.", "b.")]


def test_one_sentence_stays_whatever_it_takes() -> None:
    long = example(("A", ["", "a b c d e f.", "g."]), ("B", ["h i j k l m."]), gold=[("B", 0)])
    cut = select_context(long, ContextSettings(max_tokens=1), words)
    assert cut == (Paragraph("A", ("", "a b c d e f.")),)
    gold = select_context(long, ContextSettings(distractors=0, max_tokens=1), words)
    assert gold == (long.context[1],)


def test_empty_sentences_keep_their_place() -> None:
    gaps = example(("A", ["", "a.", " ", "b."]), ("B", ["b c d e."]), gold=[("A", 3)])
    (reduced,) = apply_context([gaps], ContextSettings(max_tokens=4), words)
    assert reduced.context == (Paragraph("A", ("", "a.", " ", "b.")),)
    assert reduced.gold_sentences() == ("b.",)


def test_cut_facts_drop_out_and_show() -> None:
    (reduced,) = apply_context([FIVE], ContextSettings(max_tokens=15), words)
    assert reduced.supporting_facts == (SupportingFact("B", 0),)
    assert (len(FIVE.gold_sentences()), len(reduced.gold_sentences())) == (2, 1)
    assert (reduced.id, reduced.question, reduced.answer) == (FIVE.id, FIVE.question, FIVE.answer)


def test_the_whole_decides_where_parts_do_not_add_up() -> None:
    def superadditive(text: str) -> int:
        return words(text) ** 2

    cut = select_context(FIVE, ContextSettings(max_tokens=30), superadditive)
    assert superadditive(render_context(cut)) <= 30


def test_no_context_stays_none() -> None:
    toy = Example("counting-1", "Write increasing numbers from 1.", "", ())
    assert apply_context([toy], ContextSettings(distractors=0, max_tokens=1), words) == [toy]


def test_render_context() -> None:
    paragraphs = [
        Paragraph("A", (" a. ", "", "b.")),
        Paragraph("Empty", ("", " ")),
        Paragraph("", ("c.",)),
    ]
    assert render_context(paragraphs) == "A: a. b.\nc."
    assert render_context([]) == ""


sentences = st.lists(st.sampled_from(["", "one.", "two two.", "a b c d e f."]), max_size=5)
contexts = st.lists(st.tuples(st.sampled_from("ABC"), sentences), max_size=6)
golds = st.lists(st.tuples(st.sampled_from("ABCD"), st.integers(0, 5)), max_size=4)
distractors = st.one_of(st.just("all"), st.integers(0, 4))


@given(contexts, golds, distractors, st.integers(1, 40))
def test_selection_keeps_its_promises(
    paragraphs: list[tuple[str, list[str]]],
    gold: list[tuple[str, int]],
    shown: int | str,
    budget: int,
) -> None:
    full = example(*paragraphs, gold=gold)
    settings = ContextSettings.model_validate({"distractors": shown, "max_tokens": budget})
    (reduced,) = apply_context([full], settings, words)
    kept = sum(bool(s.strip()) for p in reduced.context for s in p.sentences)
    assert words(render_context(reduced.context)) <= budget or kept == 1
    there = any(s.strip() for p in full.context for s in p.sentences)
    if shown == "all":
        assert bool(kept) == there
    # Fronts of the original paragraphs, in their order.
    rest = iter(full.context)
    for paragraph in reduced.context:
        assert any(
            p.title == paragraph.title
            and p.sentences[: len(paragraph.sentences)] == paragraph.sentences
            for p in rest
        )
    assert set(reduced.supporting_facts) <= set(full.supporting_facts)
    assert len(reduced.gold_sentences()) <= len(full.gold_sentences())


def test_the_shipped_questions_fit_their_budget() -> None:
    samples = load_examples(SampleData(kind="sample", split="validation")).examples
    gold = apply_context(samples, ContextSettings(distractors=0), words)
    assert all(len(e.context) == 2 for e in gold)
    assert [e.gold_sentences() for e in gold] == [e.gold_sentences() for e in samples]
    tight = apply_context(samples, ContextSettings(max_tokens=200), words)
    assert max(words(render_context(e.context)) for e in tight) <= 200
