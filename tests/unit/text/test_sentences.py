"""Where sentences end, in the languages that mark it."""

# ruff: noqa: RUF001

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcot.text.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. No met J. F. Smith in the U.S. Army.", ["Dr. No met J. F. Smith in the U.S. Army."]),
        ("It cost 3.5 million. In 1999 it fell.", ["It cost 3.5 million.", "In 1999 it fell."]),
        ('He said "No." She left (early.) Then', ['He said "No."', "She left (early.)", "Then"]),
        ("born c. 1900 in St. Ives, e.g. there", ["born c. 1900 in St. Ives, e.g. there"]),
        ("lower case. follows", ["lower case.", "follows"]),
        (
            "They met in Jan. 2005 in St. Louis. It rained.",
            ["They met in Jan. 2005 in St. Louis.", "It rained."],
        ),
        ("Smith et al. found approx. 5 of them.", ["Smith et al. found approx. 5 of them."]),
        ("I am. So am I. You are not.", ["I am.", "So am I.", "You are not."]),
        ('"M." Ward sang. \nAnd left', ['"M." Ward sang.', "And left"]),
        ("Eins. Österreich folgt. (Zwei)", ["Eins.", "Österreich folgt.", "(Zwei)"]),
        ("湖在县里。它很大！“是吗？”他说。", ["湖在县里。", "它很大！", "“是吗？”", "他说。"]),
        ("湖です。大きい！？はい。。。", ["湖です。", "大きい！？", "はい。。。"]),
        ("यह झील है। वह बड़ी है॥", ["यह झील है।", "वह बड़ी है॥"]),
        ("یہ جھیل ہے۔ کیا؟ ہاں۔", ["یہ جھیل ہے۔", "کیا؟", "ہاں۔"]),
        ("هذه بحيرة. هل هي كبيرة؟ نعم.", ["هذه بحيرة.", "هل هي كبيرة؟", "نعم."]),
        ("Սա լիճ է։ Այն մեծ է։", ["Սա լիճ է։", "Այն մեծ է։"]),
        ("Озеро А. С. Пушкина. Оно мало.", ["Озеро А. С. Пушкина.", "Оно мало."]),
        (" \n ", []),
    ],
)
def test_split_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize("piece", ["Mr. A. ", "。", "。 ", ". ", '."', ". a", "？」", "x", "  "])
def test_splitting_takes_time_in_proportion_to_the_text(piece: str) -> None:
    def seconds(count: int) -> float:
        start = time.process_time()
        split_sentences(piece * count)
        return time.process_time() - start

    assert seconds(200_000) < 40 * max(seconds(10_000), 0.01)


@given(st.text(alphabet="aB.!? \n\"'()1。！」।", max_size=60))
def test_splitting_loses_white_space_only(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
