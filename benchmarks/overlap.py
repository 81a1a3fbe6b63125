"""Measures how much of a step asynchronous refinement hides.

    python -m benchmarks.overlap [--prompts 4] [--samples 4] [--tokens 48] [--steps 4]

SmolLM2-135M samples rationales for HotpotQA questions and learns from them (GRPO) on this machine;
the frozen LM is an HTTP endpoint in a separate process that takes half a second for each reply.
Every rationale takes nine requests: an answer, and a question for each aspect.

First it measures each phase separately, on the batches of the runs: sampling, learning (including
the publishing of the weights), judging. It sets the endpoint's concurrency so that judging lasts
as long as sampling and learning together. Then it runs `refine` at max_staleness 0 and at 1. At 0
the units of a batch are judged while others are sampled, so its step is shorter than the sum of the
phases. A step takes at least the longer of judging and of sampling + learning, since
those two share the machine's cores; the gain is the share of the time between this bound and the
synchronous step that the asynchronous step saves. The goal is 0.8.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import SMOLLM2
from benchmarks.endpoint import serving
from lmcot.actors.resources.cluster import ray_cluster
from lmcot.actors.reward_actor import RewardActor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import Packed, RolloutUnit, ScoreUnit
from lmcot.config import ASPECTS, Config, parse_config
from lmcot.data.sampler import PromptSampler
from lmcot.learner.plan import refine_plan
from lmcot.monitor.metrics import read_metrics
from lmcot.records import Judgement, Rollout, ScoredRollout
from lmcot.run.context import Run, in_units, open_run
from lmcot.training.learners import Learners
from lmcot.training.refine import refine

DELAY_S = 0.5
WARM_UP = 2
"""First steps of a run that are not counted; the last one, which samples nothing, is not either."""
PHASES = 3
"""Number of batches on which each phase is measured; the first is a warm-up."""
REQUESTS = 1 + len(ASPECTS)
"""Number of requests to judge one rationale."""
GOAL = 0.8

Batch = list[tuple[RolloutUnit, Packed[list[Rollout]]]]


@dataclass(frozen=True)
class Case:
    """The case that the command line describes."""

    prompts: int
    samples: int
    tokens: int
    steps: int
    threads: int
    dtype: str

    def config(self, url: str, *, staleness: int = 0, concurrency: int = 1) -> Config:
        """The settings of this case."""
        sample = {"kind": "sample", "split": "train"}
        computing = {"cpus": 0.5, "threads": self.threads}
        return parse_config(
            {
                "data": {
                    "train": sample,
                    "validation": sample,
                    "max_validation": 1,
                    "context": {"distractors": 0, "max_tokens": 256},
                },
                "policy": {"source": SMOLLM2, "dtype": self.dtype, "max_new_tokens": self.tokens},
                "frozen": {
                    "backend": "openai",
                    "base_url": url,
                    "model": "m",
                    "concurrency": concurrency,
                    "cache": {"enabled": False},
                },
                "rewards": {
                    "kind": "guidance",
                    "aspects": {name: {"source": "judge"} for name in ASPECTS},
                },
                "refine": {
                    "start_from": "base",
                    "steps": WARM_UP + self.steps + 1,
                    "prompts_per_step": self.prompts,
                    "samples_per_prompt": self.samples,
                    "max_staleness": staleness,
                    "advantage": {"kind": "grpo"},
                },
                "learner": {"zero_stage": 0},
                "actors": {
                    "prompts_per_unit": max(1, self.prompts // 4),
                    "rollout": computing,
                    "learner": computing,
                    "frozen": {"cpus": 0.1},
                    "reward": {"count": 2, "cpus": 0.1},
                },
                "checkpoints": {"every": 1000},
            }
        )


def units_of(run: Run, step: int) -> list[RolloutUnit]:
    """The units of a step, drawn as in `refine`."""
    config = run.config
    sampler = PromptSampler(len(run.train), config.seed)
    for _ in range(step + 1):
        rows = sampler.next(config.refine.prompts_per_step)
    examples = [run.train[row].example for row in rows]
    return [
        RolloutUnit(
            unit_id=f"step-{step + 1}/{number}",
            questions=Packed.of(tuple(examples[i] for i in group)),
            samples=config.refine.samples_per_prompt,
            temperature=config.policy.temperature,
            max_new_tokens=config.policy.max_new_tokens,
            seed=config.seed,
            step=step,
            policy_version=0,
        )
        for number, group in enumerate(
            in_units(range(len(examples)), config.actors.prompts_per_unit)
        )
    ]


def measure_rollout(run: Run) -> tuple[float, list[Batch]]:
    """Seconds of sampling alone, and the samples."""
    taken, batches = [], []
    with run.rollout_fleet(SMOLLM2, trains=True) as fleet:
        fleet.wait_ready()
        for step in range(WARM_UP - 1, WARM_UP - 1 + PHASES):
            units = units_of(run, step)
            started = time.monotonic()
            sampled = fleet.map(RolloutActor.sample, units)
            taken.append(time.monotonic() - started)
            batches.append(list(zip(units, sampled, strict=True)))
    return statistics.median(taken[1:]), batches


def measure_learn(run: Run, batches: list[Batch]) -> float:
    """Seconds of learning alone, and of publishing the new weights."""
    chooser = random.Random(0)
    taken = []
    with Learners(run, refine_plan(run.config, SMOLLM2, run.config.refine.steps)) as learners:
        learners.wait_ready()
        for step, batch in enumerate(batches):
            scored = [
                ScoredRollout(rollout, Judgement(), chooser.random())
                for _, rollouts in batch
                for rollout in rollouts.open()
            ]
            started = time.monotonic()
            learners.ppo_step([Packed.of(scored)], step).result()
            learners.publish(step + 1).result()
            taken.append(time.monotonic() - started)
    return statistics.median(taken[1:])


def measure_judge(run: Run, batches: list[Batch]) -> float:
    """Seconds of judging alone."""
    taken = []
    with run.frozen_fleet() as frozen, run.reward_fleet() as reward:
        frozen.wait_ready()
        reward.wait_ready(frozen_handles=frozen.handles)
        for batch in batches[1:]:
            units = [ScoreUnit(unit.unit_id, unit.questions, rollouts) for unit, rollouts in batch]
            started = time.monotonic()
            judged = reward.map(RewardActor.score, units)
            taken.append(time.monotonic() - started)
            failed = [failure for one in judged for failure in one.failures]
            if failed:
                raise RuntimeError(f"{len(failed)} judgements failed, the first: {failed[0]}")
    return statistics.median(taken)


def measure_run(config: Config, folder: Path) -> dict[str, float]:
    """Medians of a run's metrics over the counted steps."""
    with open_run(config, folder) as run:
        refine(run)
    counted: list[dict[str, Any]] = read_metrics(folder / "metrics.jsonl")[WARM_UP:-1]
    names = [name for name in counted[0] if name.startswith(("seconds/", "idle/"))]
    return {name: statistics.median(line[name] for line in counted) for name in names}


def show_run(name: str, found: dict[str, float]) -> None:
    """Prints the line of a run."""
    idle = ", ".join(
        f"{key.removeprefix('idle/')} {share:.0%}"
        for key, share in found.items()
        if key.startswith("idle/")
    )
    print(f"{name}: {found['seconds/step']:.1f} s a step; idle: {idle}", flush=True)


def measure(case: Case, url: str, folder: Path) -> None:
    """Prints phases, runs and the gain."""
    with open_run(case.config(url), folder / "phases") as run:
        rollout, batches = measure_rollout(run)
        learn = measure_learn(run, batches)
    rollouts = case.prompts * case.samples
    concurrency = max(1, round(rollouts * REQUESTS * DELAY_S / (rollout + learn)))
    with open_run(case.config(url, concurrency=concurrency), folder / "judging") as run:
        judge = measure_judge(run, batches)
    lengths = [len(r.response_ids) for batch in batches for _, rs in batch for r in rs.open()]
    print(
        f"{case.prompts} prompts, {case.samples} rationales each of "
        f"{statistics.fmean(lengths):.0f} tokens, {case.dtype}\n"
        f"alone: sampling {rollout:.1f} s, learning {learn:.1f} s, judging {judge:.1f} s "
        f"({judge / (rollout + learn):.2f} of the other two) at {concurrency} requests at once",
        flush=True,
    )
    found = []
    for staleness in (0, 1):
        config = case.config(url, staleness=staleness, concurrency=concurrency)
        found.append(measure_run(config, folder / f"staleness-{staleness}"))
        show_run(f"max_staleness {staleness}", found[-1])
    synchronous, asynchronous = (one["seconds/step"] for one in found)
    ideal = max(rollout + learn, judge)
    gain = (synchronous - asynchronous) / (synchronous - ideal)
    print(
        f"ideal: {ideal:.1f} s; asynchronous steps take {asynchronous / synchronous:.2f} of "
        f"synchronous ones, {asynchronous / ideal:.2f} of the ideal\n"
        f"gain: {gain:.2f} of what can be gained (goal: {GOAL})"
    )


def main() -> None:
    """Runs the measurement once."""
    parser = argparse.ArgumentParser(description="The gain of asynchronous refinement.")
    parser.add_argument("--prompts", type=int, default=4, help="questions in a step")
    parser.add_argument("--samples", type=int, default=4, help="rationales for each")
    parser.add_argument("--tokens", type=int, default=48, help="longest rationale")
    parser.add_argument("--steps", type=int, default=4, help="steps that count, of each run")
    parser.add_argument("--threads", type=int, default=2, help="of sampler and learner, each")
    parser.add_argument("--dtype", default="float32")
    case = Case(**vars(parser.parse_args()))
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(DELAY_S) as url,
        ray_cluster(case.config(url).actors),
    ):
        measure(case, url, Path(folder))


if __name__ == "__main__":
    main()
