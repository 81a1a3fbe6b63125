"""The frozen LM's reply cache: operations a second, and what a cached replay costs.

    python -m benchmarks.cache [--repeats 3]

Prints look-ups and writes a second of four processes on one file, as they are and as multiples of
one process's, and the time that the cache adds to calls of a model that answers at once. No model
runs in a replay, so all of its time is the cache's: it is compared with the time of the same call
when SmolLM2 answers.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from benchmarks.judging import batch, frozen_lm
from benchmarks.timing import medians
from lmcot.data.prompts import load_templates, reply_sampling
from lmcot.frozen.cache import ReplyCache
from lmcot.frozen.cached import CachedLM

PROCESSES = 4
CALLS, REPLIES = 200, 16
REPLY = '{"text": "' + "a reply of usual length " * 4 + '", "tokens_in": 400, "tokens_out": 9}'


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        one = [_rates(Path(folder) / f"one-{turn}", 1) for turn in range(repeats)]
        four = [_rates(Path(folder) / f"four-{turn}", PROCESSES) for turn in range(repeats)]
        for place, name in enumerate(("writes", "look-ups")):
            alone = statistics.median(rates[place] for rates in one)
            together = statistics.median(rates[place] for rates in four)
            print(
                f"{name} a second: {together:,.0f} by {PROCESSES} processes, "
                f"{together / alone:.2f} times those of one"
            )
        _replay(Path(folder) / "replay", repeats)


def _rates(path: Path, processes: int) -> tuple[float, float]:
    """Replies written and looked up per second by all processes, in calls of 16 as in a unit."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_work, args=(path, number, barrier, results))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    taken = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    writing, reading = (max(times) for times in zip(*taken, strict=True))
    total = processes * CALLS * REPLIES
    return total / writing, total / reading


def _work(path: Path, number: int, barrier: Barrier, results: SimpleQueue[list[float]]) -> None:
    cache = ReplyCache(path, 2**30)
    calls = [
        [hashlib.sha256(f"{number}/{call}/{n}".encode()).digest() for n in range(REPLIES)]
        for call in range(CALLS)
    ]
    taken = []
    for do in ("write", "read"):
        barrier.wait()
        started = time.perf_counter()
        for keys in calls:
            if do == "write":
                cache.put("model", [(key, REPLY) for key in keys])
            else:
                assert None not in cache.get(keys)
        taken.append(time.perf_counter() - started)
    results.put(taken)


def _replay(path: Path, repeats: int) -> None:
    lm = frozen_lm()
    cached = CachedLM(lm, ReplyCache(path, 2**30), whole_calls=True)
    templates = load_templates("default").showing(2)
    examples, rollouts = batch(REPLIES)
    prompts = [
        templates.guided(example, rollout.text)
        for example, rollout in zip(examples, rollouts, strict=True)
    ]
    sampling = reply_sampling(templates.file.guided, 12)
    cached.generate(prompts, sampling)
    taken = medians(
        {
            "replay": lambda: _assert(cached.generate(prompts, sampling)),
            "model": lambda: _assert(lm.generate(prompts, sampling)),
        },
        repeats,
    )
    print(
        f"a cached replay of {REPLIES} answers takes {1000 * taken['replay']:.1f} ms, "
        f"{taken['replay'] / taken['model']:.5f} times what SmolLM2 takes for them"
    )


def _assert(replies: Sequence[object]) -> None:
    assert len(replies) == REPLIES


if __name__ == "__main__":
    main()
