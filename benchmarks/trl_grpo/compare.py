"""Compares a whole GRPO step of `lmcot refine` with TRL's GRPOTrainer, in samples per second.

    benchmarks/trl_grpo/run.sh [--dtype auto|float32|bfloat16] [--steps 4] [--questions 16]
        [--rows 4 8 16]

Both refine SmolLM2-135M with a reference model on the same HotpotQA questions with their gold
paragraphs, 16 per step, four samples each of at most 64 tokens at temperature 1, one optimiser step
with a KL term, on two threads; the reward only reads two numbers in the text and costs nothing.
For lmcot this runs the real command with its actors: sampling, judging, learning and the broadcast
of the weights. TRL is timed with each number of rows in a micro-batch (``--rows``), and the fastest
counts. Each time is the median over all steps but the first. ``--dtype auto``,
the default, is bfloat16 where the processor supports it, else float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from benchmarks.cases import SMOLLM2
from lmcot.config import Config, Dtype, parse_config
from lmcot.data.render import render
from lmcot.data.sampler import PromptSampler
from lmcot.models.sources import resolve_dtype, resolve_source
from lmcot.monitor.metrics import read_metrics
from lmcot.run.context import Run, open_run
from lmcot.training.refine import refine

SAMPLES, TOKENS, THREADS = 4, 64, 2
KL, CLIP, LEARNING_RATE, EPS = 0.05, 0.2, 1e-6, 1e-8
GOAL = 2.0
PARTS = ("publish", "sample", "judge", "learn")


def config(dtype: str, questions: int, steps: int, budget: int) -> Config:
    """Args: questions: number per step; budget: tokens per micro-batch of the learner."""
    sample = {"kind": "sample"}
    computing = {"count": 1, "cpus": 0.5, "threads": THREADS}
    return parse_config(
        {
            "data": {
                "train": {**sample, "split": "train"},
                "validation": {**sample, "split": "validation"},
                "context": {"distractors": 0},
            },
            "policy": {"source": SMOLLM2, "dtype": dtype, "max_new_tokens": TOKENS},
            "rewards": {"kind": "increasing", "length": 2},
            "refine": {
                "start_from": "base",
                "steps": steps,
                "prompts_per_step": questions,
                "samples_per_prompt": SAMPLES,
                "advantage": {"kind": "grpo"},
                "clip": CLIP,
                "kl": {"kind": "fixed", "coefficient": KL, "apply_to": "loss"},
                "optimiser": {"learning_rate": LEARNING_RATE, "eps": EPS},
            },
            "learner": {"zero_stage": 0, "tokens_per_micro_batch": budget},
            "actors": {
                "prompts_per_unit": questions,
                "rollout": computing,
                "learner": computing,
                "reward": {"count": 1, "cpus": 0.25},
            },
            "checkpoints": {"every": steps},
        }
    )


def workload(run: Run) -> dict[str, Any]:
    """The workload for TRL: the same questions, step by step, as text and as tokens."""
    settings = run.config
    sampler = PromptSampler(len(run.train), settings.seed)
    steps = []
    for _ in range(settings.refine.steps):
        rows = sampler.next(settings.refine.prompts_per_step)
        examples = [run.train[row].example for row in rows]
        steps.append(
            [
                {
                    "text": render(run.templates.rationale(example), run.tokenizer),
                    "ids": run.rationale_prompt(example),
                }
                for example in examples
            ]
        )
    return {
        "model": str(Path(resolve_source(settings.policy.source)).resolve()),
        "dtype": settings.policy.dtype,
        "steps": steps,
        "samples": SAMPLES,
        "max_new_tokens": TOKENS,
        "temperature": settings.policy.temperature,
        "kl": KL,
        "clip": CLIP,
        "learning_rate": LEARNING_RATE,
        "eps": EPS,
        "threads": THREADS,
        "seed": settings.seed,
    }


def time_lmcot(settings: Config, folder: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of a step, whose parts are printed on stderr, and the workload."""
    with open_run(settings, folder) as run:
        work = workload(run)
        refine(run)
    lines = read_metrics(folder / "metrics.jsonl")
    seconds = [after["time"] - before["time"] for before, after in pairwise(lines)]
    parts = {
        part: statistics.median(line[f"seconds/{part}"] for line in lines[1:]) for part in PARTS
    }
    rollouts = [
        json.loads(line)
        for path in sorted((folder / "rollouts").iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    tokens = statistics.fmean(len(rollout["response_ids"]) for rollout in rollouts)
    _tell("lmcot", seconds, tokens, statistics.fmean(line["reward/mean"] for line in lines))
    print("  of which " + ", ".join(f"{p} {s:.2f} s" for p, s in parts.items()), file=sys.stderr)
    return statistics.median(seconds), work


def time_trl(python: str, work: dict[str, Any], rows: int, folder: Path) -> float:
    """Seconds of a step of TRL."""
    given, found = folder / "workload.json", folder / f"trl-{rows}.json"
    given.write_text(json.dumps(work), encoding="utf-8")
    script = str(Path(__file__).with_name("trl_side.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    environment.pop("PYTHONPATH", None)  # TRL has its own packages
    subprocess.run(
        [python, script, str(given), str(found), "--rows", str(rows)],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    result = json.loads(found.read_text(encoding="utf-8"))
    seconds = result["seconds"][1:]
    tokens, reward = (statistics.fmean(result[name]) for name in ("tokens", "rewards"))
    _tell(f"TRL, {rows} rows, {result['dtype']}", seconds, tokens, reward)
    return statistics.median(seconds)


def _tell(name: str, seconds: list[float], tokens: float, reward: float) -> None:
    steps = " ".join(f"{one:.1f}" for one in seconds)
    print(
        f"{name}: steps of {steps} s, {tokens:.1f} tokens a sample, mean reward {reward:.2f}",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Prints samples per second of both, and their ratio."""
    parser = argparse.ArgumentParser(description="A whole GRPO step beside TRL's.")
    parser.add_argument("--trl-python", required=True, help="of an environment with TRL")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    parser.add_argument("--steps", type=int, default=4, help="that are counted")
    parser.add_argument("--questions", type=int, default=16, help="in a step")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--budget", type=int, default=2048, help="lmcot's tokens_per_micro_batch")
    options = parser.parse_args()
    dtype = str(resolve_dtype(options.dtype)).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = config(dtype, options.questions, options.steps + 1, options.budget)
        ours, work = time_lmcot(settings, folder / "run")
        theirs = {rows: time_trl(options.trl_python, work, rows, folder) for rows in options.rows}
    samples = options.questions * SAMPLES
    best = min(theirs, key=lambda rows: theirs[rows])
    print(
        f"lmcot {samples / ours:.2f} samples/s, TRL {samples / theirs[best]:.2f} samples/s "
        f"({best} rows a micro-batch), both in {dtype}: {theirs[best] / ours:.2f} times as fast "
        f"(goal: at least {GOAL})"
    )


if __name__ == "__main__":
    main()
