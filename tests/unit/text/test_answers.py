"""Comparison of answers, and how they are read out of text."""

from __future__ import annotations

import re
import string
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lmcot.text.answers import (
    best,
    contains_gold,
    exact_match,
    f1,
    inclusion,
    normalize_answer,
)
from lmcot.text.reading import concluded_answer, extract_answer, read_text, without_conclusion
from lmcot.text.sentences import split_sentences

WORDS = st.lists(
    st.sampled_from(["the", "a", "yes", "no", "noanswer", "Paris", "paris.", "U.S.", "12", "red"]),
    max_size=6,
).map(" ".join)

COMPLETIONS = yaml.safe_load((Path(__file__).parent / "data" / "completions.yaml").read_text())


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Beatles", "beatles"),
        ("  A   band, an  act ", "band act"),
        ("U.S.A.", "usa"),
        ("1,234", "1234"),
        ("rock-and-roll", "rockandroll"),
        ("the", "the"),
        ("A", "a"),
        ("(A)", "a"),
        ("A.", "a"),
        ("An", "an"),
        ("The The", "the the"),
        ("?", "?"),
        (" + ", "+"),
        ("", ""),
        (" ", ""),
        ("Theatre", "theatre"),
        ("São Paulo", "são paulo"),
    ],
)
def test_normalize_answer(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "f1_score", "included"),
    [
        ("The Beatles.", "Beatles", 1, 1, 1),
        ("Humboldt River in Nevada", "the Humboldt River", 0, 2 * 0.5 * 1 / 1.5, 1),
        ("River Humboldt", "Humboldt River", 0, 1, 0),
        ("yes", "Yes", 1, 1, 1),
        ("yes, both are", "yes", 0, 0, 1),
        ("no", "no one", 0, 0, 0),
        ("noanswer", "Paris", 0, 0, 0),
        ("", "Paris", 0, 0, 0),
        ("1987", "1987 1988", 0, 2 * 1 * 0.5 / 1.5, 0),
        ("red red red", "red", 0, 2 * (1 / 3) / (4 / 3), 1),
        ("Rome", "Romeo", 0, 0, 0),
        ("Romeo", "Rome", 0, 0, 0),
        ("A", "A", 1, 1, 1),
        ("(A)", "A", 1, 1, 1),
        ("Option A", "A", 0, 2 * 0.5 * 1 / 1.5, 1),
        ("B", "A", 0, 0, 0),
        ("", "A", 0, 0, 0),
        ("the", "A", 0, 0, 0),
        ("An", "A", 0, 0, 0),
        ("The The", "the the", 1, 1, 1),
        ("The", "The The", 0, 2 * 1 * 0.5 / 1.5, 0),
        ("?", "?", 1, 1, 1),
        ("+", "-", 0, 0, 0),
        ("", "", 0, 0, 0),
        ("", "?", 0, 0, 0),
        ("...", "Paris", 0, 0, 0),
        ("the", "Paris", 0, 0, 0),
        ("A Paris", "Paris", 1, 1, 1),
    ],
)
def test_comparison(
    prediction: str, gold: str, em: float, f1_score: float, included: float
) -> None:
    assert exact_match(prediction, gold) == em
    assert f1(prediction, gold) == pytest.approx(f1_score)
    assert inclusion(prediction, gold) == included


@given(WORDS, WORDS)
def test_properties_of_the_comparison(one: str, other: str) -> None:
    assert 0 <= f1(one, other) <= 1
    if not _only_articles(one) and not _only_articles(other):
        assert f1(one, other) == pytest.approx(f1(other, one))
    assert exact_match(one, other) == exact_match(other, one)
    assert normalize_answer(normalize_answer(one)) == normalize_answer(one)
    assert bool(normalize_answer(one)) == bool(one.strip())
    assert exact_match(one, one) == float(bool(one.strip()))
    if exact_match(one, other):
        assert f1(one, other) == pytest.approx(1)
        assert inclusion(one, other) == 1
    if f1(one, other) == 0:
        assert exact_match(one, other) == 0


def _only_articles(answer: str) -> bool:
    return set(answer.split()) <= {"a", "the"}


def official_f1_and_em(prediction: str, gold: str) -> tuple[float, bool]:
    """As HotpotQA's ``hotpot_evaluate_v1.py`` has it, step by step."""

    def normal(text: str) -> str:
        plain = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())

    predicted, wanted = normal(prediction), normal(gold)
    same = predicted == wanted
    for one in (predicted, wanted):
        if one in ["yes", "no", "noanswer"] and not same:
            return 0.0, same
    common = sum((Counter(predicted.split()) & Counter(wanted.split())).values())
    if common == 0:
        return 0.0, same
    precision, recall = common / len(predicted.split()), common / len(wanted.split())
    return (2 * precision * recall) / (precision + recall), same


@given(WORDS, WORDS)
def test_the_comparison_is_that_of_the_official_script(one: str, other: str) -> None:
    if _only_articles(other):
        return  # the official script compares nothing with nothing
    official_f1, official_em = official_f1_and_em(one, other)
    assert f1(one, other) == official_f1
    assert exact_match(one, other) == official_em


def test_the_best_of_several_right_answers_counts() -> None:
    golds = ("Velm", "State of Velm", "Velmland")
    assert best(exact_match, "the State of Velm", golds) == 1
    assert best(f1, "Velm State", golds) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert best(exact_match, "", golds) == best(f1, "Parrow", golds) == 0


@given(st.text(max_size=60))
def test_reading_answers_never_fails(text: str) -> None:
    assert extract_answer(text) == extract_answer(text).strip()
    assert "\n" not in extract_answer(text)
    assert concluded_answer(text) == concluded_answer(text).strip()
    assert exact_match(text, text) == float(bool(text.strip()))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris", "Paris"),
        (" Paris\n\nQuestion: Who is it?\nAnswer: Someone", "Paris"),
        ("\n\nParis\nQuestion: Who is it?", "Paris"),
        ("Paris.", "Paris"),
        ('"Walls and Bridges"', "Walls and Bridges"),
        ("\u201cWalls and Bridges.\u201d", "Walls and Bridges"),
        ("**Paris**", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("Answer: Paris", "Paris"),
        ("A: Paris", "Paris"),
        ("Answer:\nParis", "Paris"),
        ("Final answer: Paris.", "Paris"),
        ("The answer is Paris.", "Paris"),
        ("The answer is: **Paris**.", "Paris"),
        ("The correct answer to the question is 'Paris'.", "Paris"),
        ("Based on the context, the answer would be Paris.", "Paris"),
        ("The answer is Paris because it is the capital of France.", "Paris"),
        ("The answer is Paris. It is the capital of France.", "Paris"),
        ("Paris. It is the capital of France.", "Paris"),
        ("<answer>Paris</answer>", "Paris"),
        ("The final answer is \\boxed{Paris}.", "Paris"),
        ("Yes, both are American.", "Yes"),
        ("No, Lake Orvane is in Norland.", "No"),
        ("No. They are in different countries.", "No"),
        ("yes", "yes"),
        ("The answer is no, they are not.", "no"),
        ("No, No, Nanette", "No, No, Nanette"),
        ("Because of Winn-Dixie", "Because of Winn-Dixie"),
        ("J. R. R. Tolkien", "J. R. R. Tolkien"),
        ("The answer is J. R. R. Tolkien. He wrote it.", "J. R. R. Tolkien"),
        ("St. Louis, Missouri", "St. Louis, Missouri"),
        ("No. 1 Squadron", "No. 1 Squadron"),
        ("Dec. 10, 1817", "Dec. 10, 1817"),
        ("the U.S. Army", "the U.S. Army"),
        ("Paris (France)", "Paris (France)"),
        ("3,677 seated", "3,677 seated"),
        ("Answering machine", "Answering machine"),
        ("Sure! Here is the answer:\n\nVelm", "Velm"),
        ("Sure!\n\nVelm", "Velm"),
        ("The answer in a few words: Velm", "Velm"),
        ("The answer in a few words: Velm\n\nThe answer in a few words: Velm", "Velm"),
        ("The answer in a few words", ""),
        ("The answer in a few words:", ""),
        ("The answer in a few words is Velm.", "Velm"),
        ("1. Velm", "Velm"),
        ("2. Velm", "Velm"),
        ("1) Velm", "Velm"),
        ("(1) Velm", "Velm"),
        ("1. Velm\n2. Parrow", "Velm"),
        ("Answer:\n1. Velm", "Velm"),
        ("The answer is:\n\n1. Velm", "Velm"),
        ("1. FC Köln", "1. FC Köln"),
        ("2. The Beatles", "The Beatles"),
        ("2. The band had two drummers.", "2"),
        ("Okay, Velm.", "Velm"),
        ("2. Bundesliga", "2. Bundesliga"),
        ("The answer is 1. FC Köln.", "1. FC Köln"),
        ("3. Oktober 1990", "3. Oktober 1990"),
        ("1945.", "1945"),
        ("1945. It was the end of the war.", "1945"),
        ("50. That is how many there are.", "50"),
        ("The answer is 3. Lake Velm has three islands.", "3"),
        ("3.5 million", "3.5 million"),
        ("12", "12"),
        ("Velm<|im_end|>", "Velm"),
        ("Velm</s>", "Velm"),
        ("<s> Velm", "Velm"),
        ("<pad> Velm", "Velm"),
        ("Velm<|eot_id|><|start_header_id|>user<|end_header_id|> The answer is Parrow", "Velm"),
        ("[/INST] Velm", "Velm"),
        ("<|begin_of_box|>Velm<|end_of_box|>", "Velm"),
        ("Parrow? No. <|begin_of_box|>Velm<|end_of_box|> it is.", "Velm"),
        ("<final_answer>Velm</final_answer>", "Velm"),
        ("<b>Velm</b>", "Velm"),
        ("<p>Velm</p><p>It is a state.</p>", "Velm"),
        ('<span class="a">Velm</span>', "Velm"),
        ("Velm<br>It is a state.", "Velm"),
        ("Johnson &amp; Sons", "Johnson & Sons"),
        ("# Velm", "Velm"),
        ("[Velm]", "Velm"),
        ("[ANSWER]Velm[/ANSWER]", "Velm"),
        ("<ans>Velm</ans>", "Velm"),
        ("$\\text{Velm}$", "Velm"),
        ("\\(Velm\\)", "Velm"),
        ("$5", "$5"),
        ("\u00abVelm\u00bb", "Velm"),
        ("\u201eVelm\u201c", "Velm"),
        ("Velm [1].", "Velm"),
        ("Velm\u301012\u3011", "Velm"),
        ("Velm\u200b", "Velm"),
        ("\u2581Velm", "Velm"),
        ("Response: Velm", "Velm"),
        ("Assistant: Velm", "Velm"),
        ("In short, Velm.", "Velm"),
        ("Answer (in a few words): Velm", "Velm"),
        ("<s>[INST] In which state? [/INST] Velm </s>", "Velm"),
        ("Die Antwort ist Velm.", "Velm"),
        ("La r\u00e9ponse est Velm.", "Velm"),
        ("\u7b54\u6848\u662f\uff1a\u6771\u4eac\u3002", "\u6771\u4eac"),
        ("\u6771\u4eac\u3002", "\u6771\u4eac"),
        ("?", "?"),
        ("+", "+"),
        ('{"answer": ["Velm"]}', "Velm"),
        ('{"answer": 12}', "12"),
        (
            "<|channel|>analysis<|message|>We need it.<|end|><|start|>assistant<|channel|>final"
            "<|message|>Velm",
            "Velm",
        ),
        # Reasoning that never says what its answer is.
        ("Lake Brann lies in Oster County.\n\nOster County is in the state of Velm.", ""),
        ("1. Lake Brann lies in Oster County.\n2. Oster County is in Velm.", ""),
        ("Ada was born in Bree. Carl was born in Dorn. Both are towns.", ""),
        ("Okay, so I need the state. Lake Brann lies in", ""),
        (
            "Brann lies in Oster County.\n\nOster County is in the state of Velm.\n\n**Velm**",
            "Velm",
        ),
        ("Brann lies in Oster County.\n\nOster is in Velm.\n\nLet me know if you need more!", ""),
        # An answer in a sentence, and what is said about it.
        ("Lake Brann lies in Velm. Velm is a state.", "Lake Brann lies in Velm"),
        ("Velm. Lake Brann lies in it. It is a state. It is large.", "Velm"),
        ("", ""),
        ("\n \n", ""),
        ("...", ""),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("Velm. Lake Brann lies in", ""),
        ("Velm.", ""),
        ("1948\n1948\n19", ""),
        ("Lake Brann lies in the st", "cut"),
        ("Lake Brann lies in Oster County. Oster County is in", "cut"),
        ("It is. So the answer is Velm. Lake", ""),
        ("It is. So the answer is Vel", "cut"),
        ("It is. So the answer is", "cut"),
        ("It is. So the answer is **Vel", "cut"),
        ("It is. \\boxed{Velm}", ""),
        ("It is. \\boxed{Vel", "cut"),
        ("Brann lies in Oster.\n\nOster lies in the state of Velm.\n\nVel", "cut"),
        ("Brann lies in Oster.\n\nOster lies in the state of", "cut"),
        ("Okay, so I need the state. Lake Brann lies in", "cut"),
        ("<think>Hm.", "cut"),
        ("", "cut"),
    ],
)
def test_a_reply_that_the_limit_cut_before_its_answer_was_said(text: str, missing: str) -> None:
    assert read_text(text, cut=True).missing == missing
    assert read_text(text, cut=False).missing == ("" if extract_answer(text) else "empty")


@pytest.mark.parametrize("row", COMPLETIONS, ids=lambda row: row["origin"])
def test_answers_in_completions_of_real_models(row: dict[str, str]) -> None:
    assert extract_answer(row["text"]) == row["answer"], row["question"]


def test_the_completions_are_of_many_kinds() -> None:
    origins = Counter(row["origin"].split(",")[0] for row in COMPLETIONS)
    assert len(origins) == 3
    assert origins.total() - origins["by hand"] >= 50


@pytest.mark.parametrize(
    ("rationale", "answer"),
    [
        ("It is \\boxed{Rome}. On reflection the answer is \\boxed{Paris}.", "Paris"),
        ("<think>The answer is Rome.</think> It is Paris.", ""),
        ("So the answer is Paris.\nNote: the answer was Rome once.", "Paris"),
        ("So the answer is not given in the context.", ""),
        ("So the answer is Paris, which is in France.", "Paris"),
        ("Go is a game. So the answer is a board game.", "a board game"),
        ("So the answer is: Walls and Bridges.", "Walls and Bridges"),
        ("The answer is Rome. No: the answer is Paris.", "Paris"),
        ("So the answer is Paris. So the answer is", "Paris"),
        ("Both are films. Therefore, the answer is yes.", "yes"),
        ("So the answer is Paris.\n\nQuestion: And? So the answer is Rome.", "Paris"),
        ("Answer: Paris\nThat is all.", "Paris"),
        ("The final answer is **Washington, D.C.**", "Washington, D.C"),
        ("Go is a game. Genjo played it.", ""),
        ("", ""),
        ("The answer is", ""),
    ],
)
def test_concluded_answer(rationale: str, answer: str) -> None:
    assert concluded_answer(rationale) == answer


@pytest.mark.parametrize(
    ("rationale", "gold", "held"),
    [
        ("The Humboldt River runs through Elko.", "humboldt river", True),
        ("The river is the Humboldt.", "Humboldt River", False),
        ("There is no doubt. So the answer is yes.", "no", False),
        ("They differ. So the answer is no.", "no", True),
        ("", "Paris", False),
        ("Anything", "", False),
        ("It is a lake, so A is a guess. So the answer is B.", "A", False),
        ("It is a lake. So the answer is A.", "A", True),
        ("Matt Johnson was the singer. So the answer is the The The.", "The The", False),
        ("Matt Johnson was the singer. So the answer is The The.", "The The", True),
    ],
)
def test_contains_gold(rationale: str, gold: str, held: bool) -> None:
    assert contains_gold(rationale, gold) is held
    assert contains_gold(rationale, ["Never", gold]) is held


@pytest.mark.parametrize(
    ("rationale", "left"),
    [
        ("Oslo is in Norway. So the answer is Oslo.", "Oslo is in Norway."),
        ("Oslo is in Norway.", "Oslo is in Norway."),
        ("So the answer is Oslo.", ""),
        ("", ""),
        ("The answer is yes. Both are in Norway.", "Both are in Norway."),
        ("Oslo is in Norway.\nAnswer: Oslo", "Oslo is in Norway."),
        ("Oslo is in Norway.\nAnswer:\nOslo", "Oslo is in Norway."),
        ("It is in Norway. It is \\boxed{Oslo}.", "It is in Norway."),
        ("It is in Norway. <answer>Oslo</answer>", "It is in Norway."),
        ("It rains. The answer is so. It rains. So the answer is so.", "It rains. It rains."),
        (
            "The answer is not given in the text. So the answer is Oslo.",
            "The answer is not given in the text.",
        ),
    ],
)
def test_without_conclusion(rationale: str, left: str) -> None:
    assert without_conclusion(rationale) == left


def test_sentences() -> None:
    text = 'Mr. J. Smith moved to the U.S. Army. "Did he?" Yes! See No. 5 there.\nA new line'
    assert split_sentences(text) == [
        "Mr. J. Smith moved to the U.S. Army.",
        '"Did he?"',
        "Yes!",
        "See No. 5 there.",
        "A new line",
    ]
