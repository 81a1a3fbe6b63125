"""Timing for the benchmarks: medians of tasks run in turns, and peak memory per process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def medians(
    things: Mapping[str, Callable[[], None]],
    repeats: int,
    *,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each task; they run in turns, so that a slow minute affects all.

    Args:
        warm_up: whether an uncounted turn comes first.
        clock: what tells the time; ``time.process_time`` counts CPU seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(not warm_up, repeats + 1):
        for name, do in things.items():
            started = clock()
            do()
            if turn:
                taken[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def own_peak() -> float:
    """Peak resident memory of this process in GiB.

    It does not use getrusage, which in a new process starts at the peak of the parent.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def peak_memory(module: str, *arguments: str) -> float:
    """Peak memory in GiB of a process that does one task once and prints its peak at the end."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
