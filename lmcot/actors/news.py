"""One wait for the first result of several fleets and the learners."""

from __future__ import annotations

import time
from typing import Any, Protocol

import ray

LONGEST_WAIT_S = 0.25
"""Longest single wait, so that deadlines and Ctrl-C are noticed in between."""

_GATHERING_S = 5e-5
"""Pause for each call in flight. Looking through the calls takes time in proportion to their
number, so with many calls the driver lets more results gather before it looks."""


class Source(Protocol):
    """Anything that has calls in flight."""

    def refs(self) -> list[Any]:
        """Object references that become ready when there is a result."""


def wait_for_news(*sources: Source) -> None:
    """Returns when a call of one of the sources has ended, or after `LONGEST_WAIT_S`."""
    refs = [ref for source in sources for ref in source.refs()]
    if refs:
        ray.wait(refs, num_returns=1, timeout=LONGEST_WAIT_S, fetch_local=False)
        time.sleep(_GATHERING_S * len(refs))
    else:
        time.sleep(LONGEST_WAIT_S)
