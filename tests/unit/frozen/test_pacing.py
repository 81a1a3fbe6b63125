"""When requests may go, by times worked out by hand."""

from __future__ import annotations

import pytest

from lmcot.frozen.pacing import Pace, backoff_s, retry_after_s

SOME_DAY = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


class Clock:
    """Stands until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_are_spread_evenly(clock: Clock) -> None:
    pace = Pace(60, clock)
    assert [pace.book() for _ in range(3)] == [0, 1, 2]
    clock.now += 1.5
    assert pace.book() == 1.5
    clock.now += 100  # a long rest earns no burst
    assert [pace.book() for _ in range(2)] == [0, 1]


def test_a_second_s_worth_may_go_at_once(clock: Clock) -> None:
    pace = Pace(6000, clock)
    waits = [pace.book() for _ in range(102)]
    assert waits[:100] == pytest.approx([0] * 100, abs=1e-9)
    assert waits[100:] == pytest.approx([0.01, 0.02])


def test_large_amounts_wait_for_what_went_before(clock: Clock) -> None:
    pace = Pace(600, clock)  # ten in a second
    assert pace.book(30) == 0  # until 3 s
    assert pace.book(5) == pytest.approx(2.5)  # 3 to 3.5 s, and half a second is to spare
    assert pace.book(20) == pytest.approx(3.5)


def test_bookings_are_settled_with_what_was_used(clock: Clock) -> None:
    pace = Pace(600, clock)
    pace.book(30)
    pace.settle(30, 10)  # until 1 s
    assert pace.book(10) == pytest.approx(1.0)
    pace.settle(10, 25)  # until 3.5 s
    assert pace.book(10) == pytest.approx(3.5)


def test_pauses_are_random_below_a_bound_that_doubles() -> None:
    for attempt, bound in ((0, 0.5), (1, 1.0), (3, 4.0), (6, 30.0), (5000, 30.0)):
        pauses = [backoff_s(attempt) for _ in range(300)]
        assert 0 <= min(pauses) < 0.2 * bound
        assert 0.8 * bound < max(pauses) <= bound


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("7", 7),
        ("0.25", 0.25),
        ("-3", 0),
        ("nan", 0),
        ("inf", 0),
        ("soon", 0),
        ("", 0),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30),
        ("Tue, 14 Nov 2023 22:13:50 -0000", 30),
        ("Tue, 14 Nov 2023 22:13:00 GMT", 0),
        ("Tue, 14 Nov 99999999999999999999 22:13:00 GMT", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert retry_after_s(header, SOME_DAY) == pytest.approx(seconds)
