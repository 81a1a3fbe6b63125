"""Checks lmcot on a machine with one GPU, and prints what it measured as a table.

    python -m benchmarks.gpu_check [--seconds 450] [--trl-python PYTHON] [--checks NAME ...]

Each check runs in a process of its own, so that one that fails, or hangs, does not take the others
with it. ``--seconds`` limits all of them together: a check that no time is left for is told as not
run. With ``--trl-python``, the Python of an environment with TRL and vLLM, TRL takes the same GRPO
steps. The exit status is 1 if a check failed. ``--cpu`` runs the checks without a GPU, to try out
the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten

import torch

from benchmarks import gpu_parts
from benchmarks.cases import SMOLLM2
from benchmarks.gpu_parts import Part, Result

CHECKS: dict[str, Part] = {
    "zero-0": gpu_parts.learner_at(0),
    "zero-1": gpu_parts.learner_at(1),
    "zero-2": gpu_parts.learner_at(2),
    "zero-3": gpu_parts.learner_at(3),
    "attention": gpu_parts.attention,
    "own-engine": gpu_parts.own_engine,
    "vllm-engine": gpu_parts.vllm_engine,
    "grpo": gpu_parts.grpo,
    "grpo-guided": gpu_parts.grpo_guided,
    "distillation": gpu_parts.distillation,
}
ALIKE = ("zero-0", "zero-1", "zero-2", "zero-3")
"""Checks whose first figures must be the same, up to ``TOLERANCE``."""
TOLERANCE = 0.05
NEEDS_VLLM = ("vllm-engine", "grpo", "grpo-guided")
_GRACE_S = 20.0
"""How long a check that is out of time may take to end the actors that it started."""


@dataclass(frozen=True)
class Outcome:
    """What became of one check."""

    name: str
    result: Result | None
    seconds: float
    trouble: str = ""
    """Why it failed, or was not run."""
    failed: bool = False


def run(name: str, options: argparse.Namespace, left_s: float) -> Outcome:
    """Runs one check in a process of its own."""
    if name in NEEDS_VLLM and importlib.util.find_spec("vllm") is None:
        return Outcome(name, None, 0.0, "not run: vllm is not installed")
    if left_s <= 0:
        return Outcome(name, None, 0.0, "not run: no time was left (--seconds)")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu_check", *_passed_on(options)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--checks", name, "--result", str(found)],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            code = process.wait(left_s)
        except subprocess.TimeoutExpired:
            _end(process)
            trouble = f"it had not ended after {left_s:.0f} s"
            return Outcome(name, None, time.monotonic() - began, trouble, failed=True)
        finally:
            _end(process)
        seconds = time.monotonic() - began
        if code == 0:
            return Outcome(name, Result(**json.loads(found.read_text("utf-8"))), seconds)
        trouble = _reason(log.read_text("utf-8", errors="replace")) or f"exit status {code}"
        return Outcome(name, None, seconds, trouble, failed=True)


def _reason(log: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return shorten((errors or lines or [""])[-1].replace("|", "/"), 300)


def _passed_on(options: argparse.Namespace) -> list[str]:
    sizes = ("source", "dtype", "questions", "steps", "cache_gib")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in sizes]
    given += ["--cpu"] if options.cpu else []
    return [*given, f"--trl-python={options.trl_python}"] if options.trl_python else given


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a check with all that it started: at first it may end its actors itself."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # where nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judged(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, where those that must be alike and are not have failed."""
    figures = {one.name: one.result.figure for one in outcomes if one.name in ALIKE and one.result}
    wanted = figures.get(ALIKE[0])
    checked = []
    for one in outcomes:
        figure, trouble = figures.get(one.name), ""
        if one.result is not None and one.result.trouble:
            trouble = one.result.trouble
        elif figure is not None and wanted is not None:
            apart = not abs(figure - wanted) <= TOLERANCE * abs(wanted)
            trouble = f"its figure is {figure:.4g}, {ALIKE[0]}'s {wanted:.4g}" if apart else ""
        checked.append(replace(one, trouble=trouble, failed=True) if trouble else one)
    return checked


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes, a row each."""
    rows = ["| check | outcome | measured | peak memory | whole check |", "|---|---|---|---|---|"]
    for one in outcomes:
        outcome = "ok" if one.result is not None else one.trouble
        outcome = f"FAILED: {one.trouble}" if one.failed else outcome
        told = one.result.told if one.result is not None else ""
        peak = f"{one.result.peak_gib:.2f} GiB" if one.result is not None else ""
        rows.append(f"| {one.name} | {outcome} | {told} | {peak} | {one.seconds:.0f} s |")
    return "\n".join(rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Checks lmcot on a machine with one GPU.")
    parser.add_argument("--checks", nargs="+", choices=tuple(CHECKS), default=list(CHECKS))
    parser.add_argument("--seconds", type=float, default=450.0, help="for all checks together")
    parser.add_argument("--source", default=SMOLLM2, help="of both models")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--questions", type=int, default=16, help="in a step")
    parser.add_argument("--steps", type=int, default=10, help="of GRPO that are counted")
    parser.add_argument("--cache-gib", type=float, default=8.0, help="of each vLLM")
    parser.add_argument("--trl-python", default="", help="of an environment with TRL and vLLM")
    parser.add_argument("--cpu", action="store_true", help="try the script without a GPU")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks and prints the table; 1 if one failed."""
    options = _options(arguments)
    if not (options.cpu or torch.cuda.is_available()):
        print("this torch sees no GPU: run it on a machine with one, or with --cpu to try it out")
        return 2
    if options.result:
        result = CHECKS[options.checks[0]](options)
        Path(options.result).write_text(json.dumps(asdict(result)), encoding="utf-8")
        return 0
    ends = time.monotonic() + options.seconds
    outcomes = []
    for name in options.checks:
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcomes.append(run(name, options, ends - time.monotonic()))
    outcomes = judged(outcomes)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{card}; torch {torch.__version__}; {options.source}; {options.dtype}\n")
    print(table(outcomes))
    return int(any(one.failed for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
