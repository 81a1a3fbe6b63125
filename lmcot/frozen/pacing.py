"""When the next request may go: rate limits, growing pauses, and what the endpoint asks for."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime

_BURST_S = 1.0
"""The amount that may go at once is what the rate gives in this time, and at least one."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


class Pace:
    """Spreads amounts evenly over time, by virtual scheduling (GCRA).

    Args:
        per_minute: the rate.
        clock: seconds, from any start.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds_each = 60.0 / per_minute
        self._clock = clock
        self._free_at = -math.inf
        """Time at which everything booked would be done at an even rate."""

    def book(self, amount: float = 1.0) -> float:
        """Books an amount, and returns the seconds to wait until it may go."""
        now = self._clock()
        start = max(self._free_at, now)
        taken = amount * self._seconds_each
        self._free_at = start + taken
        return max(0.0, start - now - max(0.0, _BURST_S - taken))

    def settle(self, booked: float, used: float) -> None:
        """Corrects a booking by the amount that was used; waits that have begun do not change."""
        self._free_at += (used - booked) * self._seconds_each


def backoff_s(attempt: int) -> float:
    """A random pause (seconds) after an attempt, counted from 0: its bound doubles each time."""
    # Any pause up to the bound: clients that failed together do not come back together.
    return random.uniform(0.0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempt, 16)))


def retry_after_s(header: str | None, now: float) -> float:
    """Seconds that a Retry-After header asks to wait, from ``now`` (Unix time); 0 if it does not.

    The header holds seconds or an HTTP date; anything else is ignored.
    """
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return 0.0
        # A date without a zone would be read as local time; HTTP's are GMT.
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
