"""How the benchmarks time: medians of things done in turns, peaks in processes of their own."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def medians(
    things: Mapping[str, Callable[[], None]], repeats: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Seconds of each thing; they are done in turns, so that a slow minute is shared by all.

    Args:
        warm_up: whether a turn that is not counted comes first.
    """
    taken: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(not warm_up, repeats + 1):
        for name, do in things.items():
            started = time.perf_counter()
            do()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def own_peak() -> float:
    """GiB of resident memory that this process has held at most.

    Not by getrusage, which in a new process begins with what its parent held.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def peak_memory(module: str, *arguments: str) -> float:
    """GiB of resident memory of a process that does one thing once, and prints it at the end."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
