"""Self-consistency's vote over normalised answers."""

from __future__ import annotations

import pytest

from lmcot.rewards.vote import Vote, vote


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
    assert vote(["", "...", "yes", "the"]) == Vote("yes", 2, 0.25, {"yes": 1})


@pytest.mark.parametrize("answers", [[], ["", "  "], ["a", "!"]])
def test_without_any_answer_nobody_wins(answers: list[str]) -> None:
    assert vote(answers) == Vote("", None, 0.0, {})
