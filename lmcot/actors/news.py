"""Waiting for whatever comes first from several fleets and the learners."""

from __future__ import annotations

import time
from typing import Any, Protocol

import ray

LONGEST_WAIT_S = 0.25
"""Of one wait, so that deadlines and Ctrl-C are seen in between."""

_GATHERING_S = 5e-5
"""For each call underway: to look through them costs in proportion to their number, so where there
are many the driver lets more news gather before it looks."""


class Source(Protocol):
    """Has calls underway."""

    def refs(self) -> list[Any]:
        """Object references that become ready when there is news."""


def wait_for_news(*sources: Source) -> None:
    """Returns when a call of one of the sources has ended, or after `LONGEST_WAIT_S`."""
    refs = [ref for source in sources for ref in source.refs()]
    if refs:
        ray.wait(refs, num_returns=1, timeout=LONGEST_WAIT_S, fetch_local=False)
        time.sleep(_GATHERING_S * len(refs))
    else:
        time.sleep(LONGEST_WAIT_S)
