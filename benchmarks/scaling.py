"""Measures the cost of the driver, and how throughput grows with the number of actors.

    python -m benchmarks.scaling [--profile] [--steps 3] [--large-units]

Two measurements, drawn together in docs/images/scaling.png:

- fake: the whole of `refine` (its loop, pipeline, fleets, ledger, learners, monitor; prompts are
  tokenised, records scored and written) on a fake Ray whose actors take a second for a unit of 16
  rationales, half a second to judge it, two seconds to learn; with 1 to 256 rollout actors, a
  quarter as many reward actors, and four units for each rollout actor and step (weak scaling);
- real: sleeping rollout actors in separate processes, through a real fleet and a real Ray;
  with 1 to 32 of them, each with eight units.

The driver's share is its CPU time over elapsed time; with 256 + 64 actors the goal is 5%.
--large-units only does the largest fake run, with units of 64 rationales that take four times as
long. --profile only profiles the largest fake run, which slows it down.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle

from benchmarks import stand_ins
from benchmarks.cases import SMOLLM2
from benchmarks.fake_ray import FakeRay, StandIn, faked
from lmcot.actors.fleet import Fleet
from lmcot.actors.kept import Split
from lmcot.actors.learner_actor import StepMetrics
from lmcot.actors.resources.cluster import ray_cluster
from lmcot.actors.units import KeptScoreUnit, Packed, RolloutUnit, Tally, WeightsRef
from lmcot.config import ActorsSettings, Config, RoleSettings, SampleData, parse_config
from lmcot.data.loaders import load_examples
from lmcot.records import Rollout, to_json
from lmcot.run.context import open_run
from lmcot.training.refine import refine

FAKE, REAL = (1, 4, 16, 64, 256), (1, 2, 4, 8, 16, 32)
UNITS, PROMPTS, SAMPLES = 4, 4, 4
"""Units per rollout actor and step, prompts per unit, and rationales per prompt."""
REAL_UNITS = 8
GOAL = 0.05
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "scaling.png"


@dataclass(frozen=True)
class Point:
    """The measurement for one number of actors."""

    actors: int
    throughput: float
    """Rationales per second."""
    ideal: float
    """Rationales per second of actors that never wait."""
    driver: float
    """CPU seconds of the driver per 1,000 rationales."""
    share: float
    """CPU time of the driver over elapsed time."""
    passed: float = 0.0
    """Bytes that the driver sends and receives for a rationale, beside the weights."""


class _Rollout(StandIn):
    longer = 1

    def sample_split(self, unit: RolloutUnit) -> Split[None]:
        self.took = stand_ins.about(self.longer * stand_ins.SAMPLE_S)
        return Split(None, (stand_ins.sampled(unit),))


class _Reward(StandIn):
    config: Config

    def score_split(self, unit: KeptScoreUnit) -> Split[Tally]:
        self.took = stand_ins.about(_Rollout.longer * stand_ins.JUDGE_S)
        rollouts: Packed[list[Rollout]] = cloudpickle.loads(unit.rollouts.ref.payload)
        found = stand_ins.judged(unit, rollouts.open(), self.config)
        return Split(found.tally, (found.scored, found.records))


class _Learner(StandIn):
    ray: FakeRay

    def shares_prompts(self) -> bool:
        return True

    def fetch(self, *_: Any) -> list[int]:
        return []

    def ppo_step(self, *_: Any) -> StepMetrics:
        self.took = _Rollout.longer * stand_ins.LEARN_S
        values = stand_ins.training_metrics()
        return StepMetrics(values["kl"], values["batch/tokens"], values, {}, {})

    def publish(self, *_: Any) -> WeightsRef:
        return (self.ray.put(b""),)

    def updates(self) -> int:
        return 1

    def save_engine(self, *_: Any) -> dict[str, str]:
        return {}

    def export(self, *_: Any) -> None:
        return


def fake_config(data: Path, actors: int, steps: int, longer: int) -> Config:
    """The settings for a number of rollout actors and units that are ``longer`` times as long."""
    rewards = max(1, actors // 4)
    file = {"kind": "file", "path": str(data)}
    return parse_config(
        {
            "data": {
                "train": file,
                "validation": file,
                "max_validation": 1,
                "context": {"distractors": 0, "max_tokens": 256},
            },
            "policy": {"source": SMOLLM2, "max_new_tokens": stand_ins.RESPONSE},
            "frozen": {"backend": "transformers", "source": SMOLLM2, "cache": {"enabled": False}},
            "refine": {
                "start_from": "base",
                "steps": steps,
                "prompts_per_step": actors * UNITS * PROMPTS * longer,
                "samples_per_prompt": SAMPLES,
                "max_staleness": 1,
            },
            "actors": {
                "prompts_per_unit": PROMPTS * longer,
                "rollout": {"count": actors},
                "reward": {"count": rewards},
                "frozen": {"count": rewards},
            },
            "checkpoints": {"every": 1000},
        }
    )


def write_questions(path: Path, count: int) -> None:
    """Writes HotpotQA's sample repeatedly until there are enough questions."""
    found = load_examples(SampleData(kind="sample", split="train")).examples
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            record = to_json(found[number % len(found)])
            file.write(json.dumps({**record, "id": f"q{number}"}) + "\n")


def fake_point(
    actors: int, steps: int, profile: cProfile.Profile | None = None, longer: int = 1
) -> Point:
    """Refines on a fake Ray, without counting the first and the last step.

    Args:
        longer: factor on the units, in questions and in seconds.
    """
    lines: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        data = Path(folder) / "questions.jsonl"
        prompts = actors * UNITS * PROMPTS * longer
        write_questions(data, 2 * prompts)
        roles: dict[str, type[StandIn]] = {
            "RolloutActor": _Rollout,
            "RewardActor": _Reward,
            "FrozenActor": StandIn,
            "LearnerActor": _Learner,
        }
        fake = stack.enter_context(faked(roles))
        _Learner.ray = fake
        config = _Reward.config = fake_config(data, actors, steps + 2, longer)
        _Rollout.longer = longer
        run = stack.enter_context(open_run(config, Path(folder) / "run"))
        spent, passed, bytes_of_steps = 0.0, 0, []

        def on_step(step: int, metrics: dict[str, float]) -> None:
            nonlocal spent, passed
            lines.append((metrics["seconds/step"], metrics["seconds/driver"] - fake.spent + spent))
            spent = fake.spent
            bytes_of_steps.append(fake.passed - passed)
            passed = fake.passed

        if profile is not None:
            stack.enter_context(profile)
        refine(run, on_step=on_step)
    seconds, driver = (statistics.median(column) for column in zip(*lines[1:-1], strict=True))
    rollouts = prompts * SAMPLES
    units = actors * UNITS
    least = max(
        UNITS * stand_ins.SAMPLE_S,
        units / max(1, actors // 4) * stand_ins.JUDGE_S,
        stand_ins.LEARN_S,
    )
    ideal = rollouts / (longer * least)
    passed_on = statistics.median(bytes_of_steps[1:-1]) / rollouts
    return Point(
        actors, rollouts / seconds, ideal, driver / rollouts * 1000, driver / seconds, passed_on
    )


def real_point(actors: int) -> Point:
    """Passes units through a real fleet of sleeping processes."""
    examples = load_examples(SampleData(kind="sample", split="train"), limit=PROMPTS).examples
    units = [
        RolloutUnit(
            str(number), Packed.of(tuple(examples)), SAMPLES, 1.0, stand_ins.RESPONSE, 0, 0, 0
        )
        for number in range(actors * REAL_UNITS)
    ]
    role = RoleSettings(count=actors, cpus=0)
    settings = ActorsSettings(start_timeout_s=600)
    with Fleet("rollout", stand_ins.Sleeper, role, settings, arguments={}) as fleet:
        fleet.wait_ready()
        fleet.map(stand_ins.Sleeper.sample, units[:actors])
        started, driver = time.monotonic(), time.process_time()
        fleet.map(stand_ins.Sleeper.sample, units)
        seconds, driver = time.monotonic() - started, time.process_time() - driver
    rollouts = len(units) * PROMPTS * SAMPLES
    ideal = actors * PROMPTS * SAMPLES / stand_ins.SAMPLE_S
    return Point(actors, rollouts / seconds, ideal, driver / rollouts * 1000, driver / seconds)


def show(name: str, points: Sequence[Point]) -> None:
    """Prints a table."""
    print(
        f"\n| {name} actors | rationales/s | of the ideal | driver, CPU s per 1,000 | share "
        "| bytes per rationale |\n|---|---|---|---|---|---|"
    )
    for one in points:
        print(
            f"| {one.actors} | {one.throughput:,.0f} | {one.throughput / one.ideal:.0%} "
            f"| {one.driver:.3f} | {one.share:.1%} | {one.passed:,.0f} |",
            flush=True,
        )


def plot(fake: Sequence[Point], real: Sequence[Point]) -> None:
    """Plots throughput and the driver's share by the number of rollout actors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for points, name, colour, marker in (
        (fake, "simulated actors, whole loop", "tab:blue", "o"),
        (real, "real processes, sampling", "tab:orange", "s"),
    ):
        actors = [one.actors for one in points]
        speed = [one.throughput / (one.ideal / one.actors) for one in points]
        left.plot(actors, speed, marker=marker, color=colour, label=name)
        shares = [100 * one.share for one in points]
        right.plot(actors, shares, marker=marker, color=colour, label=name)
    left.plot(FAKE, FAKE, "--", color="gray", label="ideal", zorder=0)
    left.set(yscale="log", ylabel="throughput, in actors that never wait", title="Weak scaling")
    right.axhline(100 * GOAL, linestyle="--", color="gray", label=f"goal, {GOAL:.0%}", zorder=0)
    right.set(yscale="log", ylabel="% of the time", title="The driver's own CPU time")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rollout actors", xticks=FAKE, xticklabels=FAKE)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set(yticks=FAKE, yticklabels=FAKE)
    ticks = (0.5, 1, 2, 5, 10, 20, 50, 100)
    right.set(yticks=ticks, yticklabels=[f"{tick:g}" for tick in ticks])
    for axes in (left, right):
        axes.minorticks_off()
    figure.savefig(IMAGE, dpi=130)


def show_profile(steps: int) -> None:
    """Prints where the largest fake run spends its time."""
    profile = cProfile.Profile(time.process_time)
    fake_point(FAKE[-1], steps, profile)
    stats = pstats.Stats(profile)
    stats.sort_stats("cumulative").print_stats("lmcot|benchmarks", 45)
    stats.sort_stats("tottime").print_stats(30)


def main() -> None:
    """Prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(description="The driver's own work, and weak scaling.")
    parser.add_argument("--steps", type=int, default=3, help="steps that count, of each fake run")
    parser.add_argument("--profile", action="store_true", help="only: where the driver's time goes")
    parser.add_argument("--large-units", action="store_true", help="only: the largest, with those")
    options = parser.parse_args()
    if options.large_units:
        show("simulated, large units:", [fake_point(FAKE[-1], options.steps, longer=4)])
        return
    if options.profile:
        show_profile(options.steps)
        return
    fake = [fake_point(actors, options.steps) for actors in FAKE]
    show("simulated", fake)
    with ray_cluster(ActorsSettings()):
        real = [real_point(actors) for actors in REAL]
    show("real", real)
    plot(fake, real)
    print(f"\nthe driver's share with {FAKE[-1]} + {FAKE[-1] // 4} actors: {fake[-1].share:.1%}")


if __name__ == "__main__":
    main()
