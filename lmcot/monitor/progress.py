"""Progress is a bar on a terminal, and a few plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

_quiet = False
"""Whether neither lines nor bars are shown."""


def be_quiet(quiet: bool = True) -> None:
    """Shows no more lines and bars in this process; what fails is still raised."""
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """Prints a line about what is being done on stderr, unless this process is quiet."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Shows how far a stage is, on stderr: a tqdm bar on a terminal, else plain lines.

    Plain lines come at most every ``interval`` seconds, with the elapsed and the estimated
    remaining time, and always for the last step. ``done`` is where a resumed stage begins.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        unit: str = "step",
        done: int = 0,
        interval: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._first = done
        self._interval = interval
        self._stream = stream or sys.stderr
        self._started = self._shown = time.monotonic()
        self._pending = ""
        self._bar = (
            tqdm(total=total, initial=done, desc=name, unit=unit, file=self._stream)
            if self._stream.isatty() and not _quiet
            else None
        )

    def update(self, n: int = 1, **values: float) -> None:
        """Counts ``n`` more units as done; ``values`` (such as a loss) are shown beside it."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix({key: f"{value:.4g}" for key, value in values.items()}, False)
            self._bar.update(n)
            return
        now = time.monotonic()
        self._pending = self._line(now - self._started, values)
        if self.done >= self.total or now - self._shown >= self._interval:
            self._show()
            self._shown = now

    def move_to(self, done: int) -> None:
        """Moves back or forward to the number of units done."""
        self.done = done
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh()

    def write(self, text: str) -> None:
        """Prints a line of text without breaking the bar."""
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        elif not _quiet:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the last state and ends the display."""
        if self._bar is not None:
            self._bar.close()
        self._show()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _show(self) -> None:
        if self._pending and not _quiet:
            print(self._pending, file=self._stream, flush=True)
        self._pending = ""

    def _line(self, elapsed: float, values: dict[str, float]) -> str:
        here = self.done - self._first
        left = elapsed / here * max(self.total - self.done, 0) if here else 0.0
        share = 100 * self.done / self.total if self.total else 100.0
        parts = [
            f"{self.name}: {self.done}/{self.total} {self.unit}s ({share:.0f}%)",
            f"elapsed {_clock(elapsed)}",
            *([f"about {_clock(left)} left"] if here and self.done < self.total else []),
            *(f"{key} {value:.4g}" for key, value in values.items()),
        ]
        return ", ".join(parts)


def progress(name: str, total: int, *, unit: str = "step", done: int = 0) -> Progress:
    """A `Progress` on stderr: ``with progress("distil", total=16) as bar: bar.update(1)``."""
    return Progress(name, total, unit=unit, done=done)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
