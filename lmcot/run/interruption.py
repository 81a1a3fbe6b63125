"""Ctrl-C and SIGTERM become a request that the stages see at their next safe point."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lmcot.errors import Interrupted


class Interruption:
    """Turns the first signal into a request to end; the second one ends the process at once.

    Outside the main thread (Ray Tune runs trials there) signals stay as they are.
    """

    def __init__(
        self,
        notice: str = "ending at the next safe point, with a checkpoint",
        also: Callable[[], None] = lambda: None,
    ) -> None:
        """Sets what is printed and checked.

        Args:
            notice: the text printed at the first signal.
            also: checks for other reasons to end; raises if there is one.
        """
        self.requested = False
        self._also = also
        self._notice = notice
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Interrupted` if an end was requested, or what the other check raises."""
        self._also()
        if self.requested:
            raise Interrupted

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(f"{self._notice} (again to end at once) ...", file=sys.stderr, flush=True)
