"""Self-consistency's vote over normalised answers."""

from __future__ import annotations

import pytest

from lmcot.text.vote import Vote, vote


def test_answers_that_differ_in_form_only_vote_together() -> None:
    assert vote(["Paris", "The Paris.", "Lyon", "paris"]) == Vote(
        "Paris", 0, 0.75, {"paris": 3, "lyon": 1}
    )


def test_the_winner_is_the_first_that_gave_the_winning_answer() -> None:
    found = vote(["Lyon", "the Seine", "Seine!"])
    assert (found.answer, found.winner) == ("the Seine", 1)
    assert found.share == pytest.approx(2 / 3)


def test_of_equals_the_first_wins() -> None:
    assert vote(["b", "c", "c", "b"]).answer == "b"


def test_who_gives_no_answer_has_a_vote_for_nothing() -> None:
    assert vote(["", " ", "yes", ""]) == Vote("yes", 2, 0.25, {"yes": 1})


def test_the_letter_of_an_option_votes_as_any_answer() -> None:
    assert vote(["A", "A.", "(A)", "B", "B"]) == Vote("A", 0, 0.6, {"a": 3, "b": 2})
    assert vote(["+", "-", "+"]) == Vote("+", 0, 2 / 3, {"+": 2, "-": 1})


def test_what_was_cut_votes_only_where_nobody_else_does() -> None:
    answers = ["195", "1950", "195", "195", "", "1950"]
    cut = [True, False, True, True, False, False]
    assert vote(answers, cut) == Vote("1950", 1, 2 / 6, {"1950": 2})
    assert vote(answers, [True] * 6).answer == "195"
    assert vote(["195", ""], [True, False]).answer == "195", "an empty answer is none"


@pytest.mark.parametrize("answers", [[], ["", "  "]])
def test_without_any_answer_nobody_wins(answers: list[str]) -> None:
    assert vote(answers) == Vote("", None, 0.0, {})
