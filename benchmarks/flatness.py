"""Measures whether memory stays flat in a long run of the toy task with a frozen LM.

    python -m benchmarks.flatness [--steps 300]

Every few steps it samples the anonymous memory and open files of all processes, by role, and the
used bytes of the object store. Pages of files (programs and libraries) are left out: the kernel
counts them as a process's own until another process maps the same file. It prints the medians of
the second and the last quarter of the run, and their ratio; the first quarter is warm-up. The goal
is a ratio of at most 1.05, or a rise of at most 4 MiB or 4 files where a figure is small. Ray's
own processes are listed too, except its idle workers, which come and go.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray._private.internal_api import node_stats

from lmcot.config import load_config
from lmcot.run.context import open_run
from lmcot.training.refine import refine

CONFIG = Path(__file__).parents[1] / "configs" / "toy.yaml"
SETTINGS = (
    "frozen={backend: transformers, source: 'random:counting-llama', dtype: float32, "
    "max_answer_tokens: 4, cache: {enabled: false}}",
    "rewards={kind: guidance}",
    "refine.prompts_per_step=4",
    "refine.samples_per_prompt=3",
    "refine.epochs=1",
    "refine.max_staleness=1",
    "actors.prompts_per_unit=2",
    "actors.rollout.cpus=0.2",
    "actors.reward.cpus=0.1",
    "actors.frozen.cpus=0.2",
    "actors.learner.cpus=0.2",
)
GOAL = 1.05
TOLERATED = {"MiB": 4.0, "files": 4.0}
EVERY = 3
_ACTOR = re.compile(r"ray::(\w+)")
_RAY = ("raylet", "gcs_server")

Sample = dict[tuple[str, str], float]
"""Amount by (whose, unit)."""


@dataclass(frozen=True)
class Trend:
    """The medians of an earlier and a later part of a run."""

    name: str
    unit: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Ratio of the later to the earlier median."""
        return self.after / self.before if self.before else float(self.after == 0) or float("inf")

    def flat(self, goal: float, tolerated: float) -> bool:
        """Whether the rise is within the ratio or, for a small figure, within the amount."""
        return self.ratio <= goal or self.after - self.before <= tolerated


def take_sample() -> Sample:
    """Samples the memory and files of this process, its actors and Ray."""
    found: Sample = defaultdict(float)
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            role = _role(process)
            if role is not None:
                found[role, "MiB"] += _anonymous(process) / 2**20
                found[role, "files"] += process.num_fds()
        except psutil.Error:
            continue  # it has just ended
    found["object store", "MiB"] = _stored() / 2**20
    return dict(found)


def _anonymous(process: psutil.Process) -> int:
    """Bytes of a process's memory that no file holds."""
    return sum(mapping.anonymous for mapping in process.memory_maps())


def _role(process: psutil.Process) -> str | None:
    """The role of a process: the driver, an actor's class or a part of Ray; None to skip it."""
    if process.pid == psutil.Process().pid:
        return "driver"
    title = " ".join(process.cmdline())
    if actor := _ACTOR.search(title):
        return None if actor[1] == "IDLE" else actor[1]
    return next((name for name in _RAY if name in process.name()), None)


def _stored() -> int:
    """Used bytes of the object stores of all nodes."""
    return sum(
        node_stats(
            node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False
        ).store_stats.object_store_bytes_used
        for node in ray.nodes()
        if node["Alive"]
    )


def trends(before: Sequence[Sample], after: Sequence[Sample]) -> list[Trend]:
    """The trend of each figure that both parts have."""
    names = sorted({name for one in before for name in one} & {n for one in after for n in one})
    return [
        Trend(
            *name,
            statistics.median(one[name] for one in before if name in one),
            statistics.median(one[name] for one in after if name in one),
        )
        for name in names
    ]


def sampled_run(folder: Path, steps: int, *overrides: str, every: int = EVERY) -> list[Sample]:
    """Refines for a number of steps and takes a sample after every few."""
    found: list[Sample] = []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step % every == 0:
            found.append(take_sample())

    config = load_config(CONFIG, [*SETTINGS, f"refine.steps={steps}", *overrides])
    with open_run(config, folder) as run:
        refine(run, on_step=on_step)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Memory and open files over a long run.")
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        samples = sampled_run(Path(folder), steps, "checkpoints.every=20")
    quarter = len(samples) // 4
    found = trends(samples[quarter : 2 * quarter], samples[-quarter:])
    print("| whose | unit | second quarter | last quarter | ratio | |\n|---|---|---|---|---|---|")
    for one in found:
        verdict = "" if one.flat(GOAL, TOLERATED[one.unit]) else "GROWS"
        print(
            f"| {one.name} | {one.unit} | {one.before:.1f} | {one.after:.1f} | {one.ratio:.3f} "
            f"| {verdict} |"
        )
    growing = sum(not one.flat(GOAL, TOLERATED[one.unit]) for one in found)
    print(f"{growing} of {len(found)} figures grow over {steps} steps (goal: 0)")


if __name__ == "__main__":
    main()
