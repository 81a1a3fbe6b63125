"""The work ledger: every unit is done, and counted, once."""

from __future__ import annotations

import random

import pytest

from lmcot.actors.ledger import Assignment, Ledger, UnitLost


def ledger(attempts: int = 3, actors: int = 2) -> Ledger:
    return Ledger(attempts, 10.0, actors=actors)


def given(book: Ledger, actor: int, now: float = 0.0) -> Assignment:
    assignment = book.assign(actor, now)
    assert assignment is not None
    return assignment


def anyone(actor: int) -> bool:
    return True


def test_units_are_given_out_in_order_one_to_an_actor() -> None:
    book = ledger()
    for key in "abc":
        book.add(key, key.upper())
    first, second = given(book, 0), given(book, 1)
    assert (first.entry.key, first.entry.unit, second.entry.key) == ("a", "A", "b")
    assert book.assign(0, 0.0) is None, "it has one"
    assert book.waiting == 1
    assert book.settle(first)
    assert given(book, 0).entry.key == "c"
    assert book.assign(2, 0.0) is None, "none waits"


def test_an_actor_that_batches_has_several_and_they_are_spread_evenly() -> None:
    book = Ledger(3, 10.0, actors=2, at_once=2)
    for key in "abcde":
        book.add(key, None)
    order = []
    while (actor := book.freest(anyone)) is not None:
        order.append((actor, given(book, actor).entry.key))
    assert order == [(0, "a"), (1, "b"), (0, "c"), (1, "d")]
    assert book.assign(0, 0.0) is None, "it has two"
    assert book.idle([0, 1]) == []
    first, third = book.units_of(0)
    assert book.settle(third)
    assert book.freest(anyone) == 0
    book.lose(first, now=5.0)
    assert book.idle([0, 1]) == [0]
    assert not book.settle(first)
    assert [given(book, 0).entry.key for _ in range(2)] == ["a", "e"]
    assert book.freest(lambda actor: False) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_freest_is_the_one_that_a_search_through_all_finds(seed: int) -> None:
    """Whatever was given, done and lost before, and whichever actors are usable."""
    chance = random.Random(seed)
    book = Ledger(10_000, 5.0, actors=6, at_once=3)
    for number in range(400):
        book.add(str(number), None)
    running: list[Assignment] = []
    for _ in range(600):
        usable = {actor for actor in range(6) if chance.random() < 0.7}
        room = [one for one in sorted(usable) if len(book.units_of(one)) < 3]
        expected = min(room, key=lambda one: len(book.units_of(one)), default=None)
        found = book.freest(usable.__contains__)
        assert found == expected
        if found is not None and chance.random() < 0.6 and book.waiting:
            running.append(given(book, found))
        elif running:
            done = running.pop(chance.randrange(len(running)))
            if chance.random() < 0.8:
                assert book.settle(done)
            else:
                book.lose(done, 1.0)


def test_a_lost_unit_comes_first_and_its_late_result_does_not_count() -> None:
    book = ledger()
    for key in "ab":
        book.add(key, None)
    lost = given(book, 0)
    book.lose(lost, now=5.0)
    again = given(book, 1)
    assert again.entry.key == "a"
    assert not book.settle(lost), "it was given to another"
    assert book.settle(again)
    assert not book.settle(again), "counted once"
    book.lose(again, now=6.0)
    assert (book.waiting, book.lost) == (1, 1)
    assert given(book, 0, 6.0).entry.key == "b"


def test_a_unit_is_tried_so_often_and_no_more() -> None:
    book = ledger(attempts=2)
    book.add("a", None)
    book.lose(given(book, 0, now=0.0), now=1.0)
    with pytest.raises(UnitLost, match="unit a was lost 2 times"):
        book.lose(given(book, 1, now=2.0), now=3.0)


def test_actors_that_were_dead_before_cost_no_attempt() -> None:
    """All actors of a node die at once; each is found dead by a unit. One a unit kills is not."""
    book = ledger(attempts=1, actors=3)
    book.add("a", None)
    for actor in range(3):
        book.lose(given(book, actor, now=10.0), now=10.1)
    assert book.waiting == 1
    with pytest.raises(UnitLost, match="unit a was lost 1 times"):
        book.lose(given(book, 0, now=20.0), now=20.1)


def test_deadlines_are_told() -> None:
    book = ledger()
    for key in "ab":
        book.add(key, None)
    early, _ = given(book, 0, now=0.0), given(book, 1, now=5.0)
    assert book.overdue(10.0) == []
    assert book.overdue(10.1) == [early]


def test_what_is_abandoned_may_be_asked_anew_while_its_actor_is_still_busy() -> None:
    book = ledger()
    book.add("a", "old")
    old = given(book, 0)
    book.abandon()
    assert book.waiting == 0
    book.add("a", "new")
    assert book.assign(0, 1.0) is None, "still at the old one"
    new = given(book, 1)
    assert not book.settle(old)
    assert book.settle(new)
    book.add("b", None)
    assert given(book, 0).entry.key == "b"


def test_an_open_unit_is_not_taken_on_twice() -> None:
    book = ledger()
    book.add("a", None)
    with pytest.raises(ValueError, match="unit a is in the ledger already"):
        book.add("a", None)
    book.settle(given(book, 0))
    book.add("a", None)


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_each_unit_counts_once(seed: int, at_once: int) -> None:
    """Results, deaths, late results and deadlines in any order."""
    chance = random.Random(seed)
    book = Ledger(10_000, 5.0, actors=4, at_once=at_once)
    keys = [str(number) for number in range(30)]
    for key in keys:
        book.add(key, None)
    counted: list[str] = []
    running: list[Assignment] = []
    late: list[Assignment] = []
    now = 0.0
    while len(counted) < 30:
        now += chance.random()
        running += [a for actor in range(4) if (a := book.assign(actor, now))]
        for assignment in book.overdue(now):
            book.lose(assignment, now)
            running.remove(assignment)
            late.append(assignment)
        if running and chance.random() < 0.7:
            assignment = running.pop(chance.randrange(len(running)))
            if chance.random() < 0.5:
                assert book.settle(assignment)
                counted.append(assignment.entry.key)
            else:
                book.lose(assignment, now)
                late.append(assignment)
        if late and chance.random() < 0.3:
            assert not book.settle(late.pop())
    assert sorted(counted) == sorted(keys)
    assert book.waiting == 0
    assert book.assign(4, now) is None, "none is given out once more"


def test_what_low_priority_comes_when_nothing_else_waits() -> None:
    """Also after what is added later; lost, it comes first like any other."""
    book = ledger(actors=1)
    book.add("evaluation", "e", low_priority=True)
    book.add("first", "a")
    assert book.waiting == 2
    first = given(book, 0)
    assert first.entry.key == "first"
    book.add("second", "b")
    assert book.settle(first)
    for key in ("second", "evaluation"):
        next_one = given(book, 0, 1.0)
        assert next_one.entry.key == key
        assert book.settle(next_one)
    book.add("evaluation", "e", low_priority=True)
    book.abandon()
    assert book.waiting == 0
