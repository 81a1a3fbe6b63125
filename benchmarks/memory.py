"""Measures the memory of two learners by ZeRO stage.

    python -m benchmarks.memory [--model smollm2|t5]

Two processes form a group and do two PPO updates on a batch of mixed lengths. The benchmark prints
the resident memory of the larger one at the peak and after the last update, in GiB and as a ratio
to stage 0. On the CPU this covers whole processes: about 1 GiB is Python and its libraries, 0.5 GiB
the reference model (SmolLM2 in float32), and the peak includes activations, which no stage divides.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
from multiprocessing.connection import Connection

import psutil

from benchmarks.cases import MODELS, load_case
from benchmarks.timing import own_peak
from lmcot.process import use_threads

SETTINGS = (
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
)
BUDGET = 768
"""Tokens per micro-batch; few, since the benchmark measures the engine's own memory."""


def _rank(
    rank: int, model: str, learner: dict[str, object], meeting: Connection, told: Connection
) -> None:
    from lmcot.learner.plan import refine_plan
    from lmcot.learner.ranks import host_meeting, join_group
    from lmcot.learner.session import LearnerSession

    use_threads(threads=1)
    if rank == 0:
        place = host_meeting()
        meeting.send(place)
    else:
        place = meeting.recv()
    join_group(rank, 2, place, 120)
    case = load_case(model, **learner, tokens_per_micro_batch=BUDGET)
    session = LearnerSession(case.config, refine_plan(case.config, case.source, 1000))
    for step in range(2):
        session.ppo.step(case.scored[:4], step)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    told.send((own_peak(), psutil.Process().memory_info().rss / 2**30))


def measure(model: str, learner: dict[str, object]) -> tuple[float, float]:
    """Peak and final memory (GiB) of the larger of two ranks."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(rank, model, learner, (here, there)[rank], tell))
        for rank, (_, tell) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    results = []
    for process, (listen, _) in zip(ranks, pipes, strict=True):
        if not listen.poll(600):
            raise TimeoutError("a rank told nothing for ten minutes")
        results.append(listen.recv())
        process.join()
    return max(peak for peak, _ in results), max(held for _, held in results)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Memory of two learners by ZeRO stage.")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    model = parser.parse_args().model
    load_case(model)  # converts the model once, before the processes start
    print("| stage | peak, GiB | after an update, GiB | ratio to stage 0 |\n|---|---|---|---|")
    first: float | None = None
    for learner in SETTINGS:
        peak, held = measure(model, dict(learner))
        first = first or held
        stage = learner["zero_stage"]
        print(f"| {stage} | {peak:.2f} | {held:.2f} | {held / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
