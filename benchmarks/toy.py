"""Tests whether every estimator and policy loss learns the toy task, on both architectures.

    python -m benchmarks.toy [--seeds 3] [--staleness 0] [--only NAME ...]

The task is that of examples/one_process.py: write increasing numbers; the best reward is 1. Sampler
and learner share one process with one thread. For each combination and seed it prints the number of
steps after which the mean reward of five steps passed 0.95, the rationales that were sampled and
learnt until then, and the CPU seconds that it took; tests run some of them. With --staleness N each
batch is sampled by a policy that is N steps old, as in asynchronous refinement.
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
from lmcot.rewards.signal import group_results

MODELS = ("random:counting-llama", "random:counting-t5")
_GRPO = "refine.advantage={kind: grpo}"
_THREE = "refine.samples_per_prompt=3"
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
    "grpo, filter": [_GRPO, "refine.filter={}"],
    # Few rationales a question are more often equal, and so are those of a coarse reward.
    "grpo, 3 samples": [_GRPO, _THREE],
    "grpo, 3 samples, filter": [_GRPO, _THREE, "refine.filter={}"],
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
    """Mean reward of each step's rationales, also of those that were left out."""
    sampled: int
    learnt: int
    """Numbers of rationales."""
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
    sampled = learnt = 0
    for step in range(config.refine.steps):
        while len(waiting) <= config.refine.max_staleness:
            asked, kept = chosen(sampler, config, len(rewards))
            waiting.append(kept)
            rewards.append(statistics.fmean(one.reward for one in asked))
            sampled += len(asked)
        if is_solved(rewards):
            break
        if batch := waiting.popleft():
            session.ppo.step(batch, step)
            learnt += len(batch)
            sampler.engine.weights_changed()
    return Outcome(rewards, sampled, learnt, time.process_time() - started)


def chosen(
    sampler: Sampler, config: Config, step: int
) -> tuple[list[ScoredRollout], list[ScoredRollout]]:
    """One step's rationales, and those that are learnt from.

    With a filter further questions are asked in place of those that are left out, as `lmcot refine`
    does.
    """
    refine = config.refine
    if refine.filter is None:
        everything = sampler.judged(step)
        return everything, everything
    wanted = refine.prompts_per_step
    questions = range(wanted + round(wanted * refine.filter.refill))
    asked: list[ScoredRollout] = []
    kept: list[ScoredRollout] = []
    while lacking := questions[: wanted - len(kept) // refine.samples_per_prompt]:
        questions = questions[len(lacking) :]
        found = sampler.judged(step, lacking)
        rollouts = [one.rollout for one in found]
        results = group_results(rollouts, found, config.rewards, refine.filter)
        left_out = [one.left_out for one in results for _ in range(one.rationales)]
        asked += found
        kept += [one for one, why in zip(found, left_out, strict=True) if not why]
    return asked, kept


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Learn the toy task in every way.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    options = parser.parse_args()
    use_threads(threads=1)
    print("| model | estimator and loss | steps | sampled | learnt | CPU seconds | last reward |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for model in MODELS:
        for way in options.only:
            runs = [
                learn(toy_config(model, way, seed, options.staleness))
                for seed in range(options.seeds)
            ]
            steps = " ".join(
                str(len(run.rewards)) if run.last > SOLVED else "never" for run in runs
            )
            sampled = " ".join(str(run.sampled) for run in runs)
            learnt = " ".join(str(run.learnt) for run in runs)
            seconds = " ".join(f"{run.seconds:.0f}" for run in runs)
            ends = " ".join(f"{run.last:.2f}" for run in runs)
            name = model.removeprefix("random:counting-")
            row = (name, way, steps, sampled, learnt, seconds, ends)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
