"""Runs of the toy task whose processes get killed, and what must be left of it."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lmcot.cli import main
from lmcot.config import load_config
from lmcot.monitor.catalogue import VARYING
from lmcot.monitor.metrics import read_metrics
from lmcot.run.context import open_run
from lmcot.training.refine import refine

if TYPE_CHECKING:
    from lmcot.storage import Place

TOY = Path(__file__).parents[2] / "configs" / "toy.yaml"
STEPS = 12
"""Of a run that `debug` looks into."""
PROMPTS, SAMPLES = 4, 3
SETTINGS = (
    f"refine.prompts_per_step={PROMPTS}",
    f"refine.samples_per_prompt={SAMPLES}",
    "refine.epochs=1",
    "actors.prompts_per_unit=2",
    "actors.rollout.count=1",
    "actors.rollout.cpus=0.2",
    "actors.reward.cpus=0.1",
    "actors.frozen.cpus=0.2",
    "actors.learner.cpus=0.2",
    "actors.max_attempts=5",
    "checkpoints.every=2",
    "checkpoints.keep=1",
)
JUDGED = (
    "frozen={backend: transformers, source: 'random:counting-llama', dtype: float32, "
    "max_answer_tokens: 4, cache: {enabled: false}}",
    "rewards={kind: guidance}",
)
"""The toy task with a frozen LM: it answers nonsense, but it must be there to do so."""

OnStep = Callable[[int, dict[str, float]], None]


def run(folder: Place, *overrides: str, on_step: OnStep = lambda step, metrics: None) -> None:
    """What `lmcot refine` does."""
    config = load_config(TOY, [*SETTINGS, *overrides])
    with open_run(config, folder) as opened:
        refine(opened, on_step=on_step)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, save those that tell how it went about it."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time", *VARYING))}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def told(folder: Path, name: str) -> list[float]:
    """One metric, step by step."""
    return [line[name] for line in read_metrics(folder / "metrics.jsonl")]


def samples(folder: Path, steps: int) -> list[list[dict[str, Any]]]:
    """The records of each step's rationales, whichever unit they were in."""
    found = []
    for step in range(1, steps + 1):
        text = (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text(encoding="utf-8")
        found.append([json.loads(line) for line in text.splitlines()])
    return found


def assert_counted_once(folder: Path, steps: int, asked: Sequence[int] = ()) -> None:
    """Every step has its questions' samples, each once; its units are its own.

    Args:
        asked: number of questions of each step; not given: ``PROMPTS`` of each.
    """
    for number, records in enumerate(samples(folder, steps), start=1):
        counts = Counter((record["example_id"], record["sample"]) for record in records)
        assert set(counts.values()) == {1}
        assert len(counts) == (asked[number - 1] if asked else PROMPTS) * SAMPLES
        assert {record["unit_id"].partition("/")[0] for record in records} == {f"step-{number}"}
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [
        *range(1, steps + 1)
    ]


def processes(kind: str) -> list[psutil.Process]:
    """Living actors of a kind among this process's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if f"ray::{kind}" in title and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


class Killer:
    """Kills (-9) one actor of a kind after some steps, at a random moment of the next one."""

    def __init__(self, plan: dict[int, Callable[[], None]], seed: int) -> None:
        self._plan = dict(plan)
        self._chance = random.Random(seed)
        self._timers: list[threading.Timer] = []
        self._shortest = math.inf
        self.errors: list[BaseException] = []

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Told after each step; a step that is done again kills nobody again."""
        # A step that waited for an actor to come back takes longer than all that are left.
        self._shortest = min(self._shortest, metrics["seconds/step"])
        strike = self._plan.pop(step, None)
        if strike is None:
            return
        delay = self._chance.random() * self._shortest
        timer = threading.Timer(delay, self._strike, args=(strike,))
        self._timers.append(timer)
        timer.start()

    def _strike(self, strike: Callable[[], None]) -> None:
        try:
            strike()
        except BaseException as error:  # told by `finish`, in the test's own thread
            self.errors.append(error)

    def finish(self) -> None:
        """Waits for the last strike; raises what went wrong with one."""
        for timer in self._timers:
            timer.join()
        assert self._plan == {}, "some strikes were never due"
        if self.errors:
            raise self.errors[0]


def kill(kind: str) -> Callable[[], None]:
    """Ends an actor of a kind at once; waits until there is one."""

    def strike() -> None:
        deadline = time.monotonic() + 30
        while not (alive := processes(kind)):
            assert time.monotonic() < deadline, f"no {kind} to kill"
            time.sleep(0.05)
        alive[0].kill()

    return strike


def command(folder: Place, *overrides: str) -> psutil.Popen:
    """The same run as a command of its own, with a cluster of its own."""
    arguments = ["refine", "--config", str(TOY), "--run-dir", str(folder), *SETTINGS, *overrides]
    return psutil.Popen(
        [sys.executable, "-m", "lmcot.cli", *arguments],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_after(
    driver: psutil.Popen, folder: Path, steps: int, number: signal.Signals
) -> tuple[int, list[psutil.Process]]:
    """Sends a command a signal once it has done so many steps.

    Returns:
        its exit code, and which of the processes that it had started outlive it for long.
    """
    deadline = time.monotonic() + 180
    while len(read_metrics(folder / "metrics.jsonl")) < steps:
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < deadline, "the command does not come to its steps"
        time.sleep(0.05)
    started = driver.children(recursive=True)
    # Of a driver that was killed, Ray's two agents of a node end only after a minute or two.
    agents = [one for one in started if one.name().endswith("Agent")]
    driver.send_signal(number)
    code = driver.wait(120)
    driver.stderr.close()
    left = psutil.wait_procs([one for one in started if one not in agents], timeout=30)[1]
    for agent in psutil.wait_procs(agents, timeout=0)[1]:
        agent.kill()
    return int(code), left


def command_line(*arguments: Any) -> int:
    """What `lmcot debug PART --run-dir FOLDER` does with a run of judged steps."""
    command, part, folder, *options = arguments
    settings = (*SETTINGS, *JUDGED, f"refine.steps={STEPS}")
    config = ["--config", str(TOY), "--run-dir", str(folder)]
    return main([command, part, *config, *options, *settings])
