"""Tests whether every estimator and policy loss learns the toy task, on both architectures.

    python -m benchmarks.toy [--seeds 3] [--staleness 0] [--only NAME ...]

The task is that of examples/one_process.py: write increasing numbers; the best reward is 1. Sampler
and learner share one process with one thread. For each combination and seed it prints the number of
steps after which the mean reward of five steps passed 0.95, and the
CPU seconds that it took; tests run some of them. With --staleness N each batch is sampled by a
policy that is N steps old, as in asynchronous refinement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from dataclasses import dataclass

from examples.one_process import CONFIG, SOLVED, Sampler, is_solved
from lmcot.config import Config, load_config
from lmcot.learner.plan import refine_plan
from lmcot.learner.session import LearnerSession
from lmcot.process import use_threads
from lmcot.records import ScoredRollout

MODELS = ("random:counting-llama", "random:counting-t5")
_GRPO = "refine.advantage={kind: grpo}"
_CRITIC_MODEL = "{kind: gae, lam: 1.0, value_coefficient: 1.0, critic: {kind: model}}"
WAYS = {
    "gae, value head": ["refine.advantage={kind: gae, lam: 1.0, value_coefficient: 1.0}"],
    "gae, critic model": [f"refine.advantage={_CRITIC_MODEL}"],
    # These advantages do not have unit variance, so the same bonus would outweigh them.
    "rloo": ["refine.advantage={kind: rloo}", "refine.entropy_coefficient=0.01"],
    "grpo": [_GRPO],
    "reinforce++": ["refine.advantage={kind: reinforce++}"],
    "grpo, clip 0.2 and 0.28": [_GRPO, "refine.loss={clip_low: 0.2, clip_high: 0.28}"],
    # The default bounds are for the mean of hundreds of tokens; the toy's rationales have six.
    "grpo, gspo": [_GRPO, "refine.loss={kind: gspo, clip_low: 0.1, clip_high: 0.15}"],
    "grpo, cispo": [_GRPO, "refine.loss={kind: cispo}"],
    # No token stops moving beyond the clip, so the toy's high rate may be too high.
    "grpo, cispo, rate 1e-3": [
        _GRPO,
        "refine.loss={kind: cispo}",
        "refine.optimiser.learning_rate=1.0e-3",
    ],
    "grpo, sequence mean": [_GRPO, "refine.loss={aggregation: sequence_mean}"],
    "dr. grpo": [
        "refine.advantage={kind: grpo, normalise: false}",
        "refine.loss={aggregation: constant}",
        "refine.entropy_coefficient=0.01",
    ],
}
"""The settings of each line of the table, by its name."""


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    rewards: list[float]
    """Mean reward of each step."""
    seconds: float
    """CPU time of this process, which excludes other work on the machine."""

    @property
    def last(self) -> float:
        """Mean reward of the last five steps."""
        return statistics.fmean(self.rewards[-5:])


def toy_config(model: str, way: str, seed: int = 0, staleness: int = 0) -> Config:
    """The settings of the toy with another model, and another estimator or loss."""
    overrides = [
        f"policy.source={model}",
        *WAYS[way],
        f"seed={seed}",
        "refine.steps=200",
        f"refine.max_staleness={staleness}",
    ]
    return load_config(CONFIG, overrides)


def learn(config: Config) -> Outcome:
    """Refines until the task is solved or all steps are done."""
    session = LearnerSession(config, refine_plan(config, config.policy.source, config.refine.steps))
    sampler = Sampler(config, session.policy.lm)
    started = time.process_time()
    rewards: list[float] = []
    waiting: deque[list[ScoredRollout]] = deque()
    for step in range(config.refine.steps):
        while len(waiting) <= config.refine.max_staleness:
            waiting.append(sampler.judged(len(rewards)))
            rewards.append(statistics.fmean(one.reward for one in waiting[-1]))
        if is_solved(rewards):
            break
        session.ppo.step(waiting.popleft(), step)
        sampler.engine.weights_changed()
    return Outcome(rewards, time.process_time() - started)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Learn the toy task in every way.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    options = parser.parse_args()
    use_threads(threads=1)
    print("| model | estimator and loss | steps | CPU seconds | reward at the end |")
    print("|---|---|---|---|---|", flush=True)
    for model in MODELS:
        for way in options.only:
            runs = [
                learn(toy_config(model, way, seed, options.staleness))
                for seed in range(options.seeds)
            ]
            steps = " ".join(
                str(len(run.rewards)) if run.last > SOLVED else "never" for run in runs
            )
            seconds = " ".join(f"{run.seconds:.0f}" for run in runs)
            ends = " ".join(f"{run.last:.2f}" for run in runs)
            name = model.removeprefix("random:counting-")
            print(f"| {name} | {way} | {steps} | {seconds} | {ends} |", flush=True)


if __name__ == "__main__":
    main()
