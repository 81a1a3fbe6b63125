from __future__ import annotations

import time
from collections.abc import Callable
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


def test_where_nothing_fits_the_beginning_of_a_gold_sentence_is_shown() -> None:
    long = example(("A", ["", "a b c d e f.", "g."]), ("B", ["h i j k l m."]), gold=[("B", 0)])
    assert select_context(long, ContextSettings(max_tokens=1), words) == (Paragraph("", ("h",)),)
    blind = replace(long, supporting_facts=())
    assert select_context(blind, ContextSettings(max_tokens=1), words) == (
        Paragraph("", ("", "a")),
    )
    (reduced,) = apply_context([long], ContextSettings(max_tokens=2), words)
    assert reduced.context == (Paragraph("B", ("h",)),)
    assert reduced.gold_sentences() == ("h",)


def test_a_sentence_longer_than_the_budget_is_cut_between_words() -> None:
    one = example(("A", ["a b c d e f g h i j.", "k."]), gold=[])
    cut = select_context(one, ContextSettings(max_tokens=7), words)
    assert cut == (Paragraph("A", ("a b c d e f",)),)


def test_long_sentences_share_the_budget_in_turn() -> None:
    """Parts of 5 words with the title: A, B, C (2), then A's next 4 words."""
    both = example(("A", ["a " * 50]), ("B", ["b " * 50]), ("C", ["c."]), gold=[])
    cut = select_context(both, ContextSettings(max_tokens=16), words)
    assert [(p.title, words(p.sentences[0])) for p in cut] == [("A", 8), ("B", 4), ("C", 1)]


def test_a_long_sentence_that_is_not_gold_closes_its_paragraph() -> None:
    one = example(("A", ["a " * 50]), ("B", ["b."]), ("C", ["c " * 9]), gold=[("B", 0)])
    cut = select_context(one, ContextSettings(max_tokens=12), words)
    assert [p.title for p in cut] == ["B", "C"]


LAKE = "\u6e56\u5728\u5965\u65af\u7279\u53bf\u5f88\u5927\u5f88\u6df1"
THAI = "\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48"  # two letters with two marks each
COUNTERS = [words, len, lambda text: len(text.encode())]


@pytest.mark.parametrize("count", COUNTERS, ids=["words", "characters", "bytes"])
@pytest.mark.parametrize("sentence", [LAKE * 100, THAI * 100, "x" * 1000, "word " * 300])
def test_the_budget_is_a_bound_in_every_language(
    count: Callable[[str], int], sentence: str
) -> None:
    long = example(("A", [sentence]), ("B", ["Short."]), gold=[("A", 0)])
    for budget in (1, 7, 60, 100):
        (reduced,) = apply_context([long], ContextSettings(max_tokens=budget), count)
        text = render_context(reduced.context)
        assert count(text) <= budget
        if budget >= 60 and count is not words:
            assert count(text) > 0.5 * budget, "the budget is used"
            assert sentence.startswith(reduced.gold_sentences()[0])


def test_a_cut_parts_no_letter_from_its_marks() -> None:
    thai = example(("", [THAI * 20]), gold=[])
    for budget in range(4, 30):
        [paragraph] = select_context(thai, ContextSettings(max_tokens=budget), len)
        assert len(paragraph.sentences[0]) == (budget - 1) // 3 * 3


def test_a_space_far_back_does_not_shorten_what_has_no_words() -> None:
    one = example(("", ["ab " + LAKE * 50]), gold=[])
    [paragraph] = select_context(one, ContextSettings(max_tokens=200), len)
    assert len(paragraph.sentences[0]) == 199


def test_cutting_takes_time_in_proportion_to_the_text() -> None:
    def seconds(size: int) -> float:
        long = example(*((f"T{n}", [LAKE * size]) for n in range(20)), gold=[])
        start = time.process_time()
        select_context(long, ContextSettings(max_tokens=500), lambda text: len(list(text)))
        return time.process_time() - start

    assert seconds(8000) < 40 * max(seconds(1000), 0.01)


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
    assert words(render_context(reduced.context)) <= budget
    there = any(s.strip() for p in full.context for s in p.sentences)
    if shown == "all":
        assert bool(kept) == there
    # Fronts of the original paragraphs, in their order.
    rest = iter(full.context)
    for paragraph in reduced.context:
        *before, last = paragraph.sentences or ("",)
        assert any(
            paragraph.title in (p.title, "")
            and all(b in (a, "") for b, a in zip(before, p.sentences, strict=False))
            and "".join(p.sentences[len(before) : len(before) + 1]).startswith(last)
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
