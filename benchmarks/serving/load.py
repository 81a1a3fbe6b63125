"""Measures the service's throughput, overhead, limits and memory.

    benchmarks/serving/run.sh [--parts overhead load bound memory fuzz] [--seconds 30]

Each part starts Ray Serve on loopback and sends requests with locust (the fuzzer is schemathesis):

- overhead: stand-ins for both models, one user: the service's own time (p50; goal: 20 ms);
- load: SmolLM2-135M guides itself, 1, 4, 16 and 64 users; throughput at 16 users over that at 1
  (goal: 2.5);
- bound: 64 users with a limit of 16 requests in flight: only 503s beyond it, and normal service
  with 4 users afterwards;
- memory: stand-ins, 2,000 requests; memory of the replicas, the last quarter over the second;
- fuzz: stand-ins, requests that schemathesis makes from the OpenAPI schema: never a 500.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
from ray import serve as ray_serve

from lmcot.answering.exchange import Draw, Query, Reply, Shown, Told, Written
from lmcot.answering.pair import Pair, open_pair
from lmcot.config import dump_config, load_config
from lmcot.records import Answer, Paragraph
from lmcot.serve import app
from lmcot.serve.run import start

ROOT = Path(__file__).parents[2]
PORT = 8317
USERS = (1, 4, 16, 64)


class SmallLM:
    """A stand-in for the small LM that computes nothing."""

    def __init__(self, *_: Any) -> None:
        return

    def version(self) -> str:
        """The name of the stand-in."""
        return "stand-in"

    async def there(self) -> bool:
        """Always returns True."""
        return True

    async def write(
        self, question: str, context: Sequence[Paragraph], draw: Draw
    ) -> AsyncGenerator[Told, None]:
        """Returns rationales at once."""
        yield Shown(tuple(context), 9, "stand-in")
        for sample in range(draw.samples):
            yield Written(sample, "It is the Humboldt River.", 7, "eos")


class FrozenLM:
    """A stand-in for the frozen LM that computes nothing."""

    def __init__(self, *_: Any) -> None:
        return

    def identity(self) -> str:
        """The name of the stand-in."""
        return "stand-in"

    async def answer(self, query: Query) -> Reply:
        """Returns an answer at once."""
        river = "Humboldt River"
        return Reply(Answer(river, river, 100, 3), version="stand-in")

    async def write_object(self, query: Query, answer: str, schema: str) -> Reply:
        """Returns prose instead of an object."""
        return Reply(Answer(answer, "", 100, 3), version="stand-in")


@contextmanager
def service(folder: Path, *overrides: str, stubs: bool) -> Iterator[str]:
    """Runs the service with SmolLM2 or stand-ins and yields its address."""
    config = load_config(str(ROOT / "configs" / "quickstart.yaml"), ["frozen.cache.enabled=false"])
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        pair: Pair = open_pair(folder, "base", [f"serve.port={PORT}", *overrides])
        with mock.patch.multiple(app, SmallLM=SmallLM, FrozenLM=FrozenLM) if stubs else _nothing():
            start(replace(pair))
        yield f"http://127.0.0.1:{PORT}"
    finally:
        ray_serve.shutdown()
        ray.shutdown()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def locust(tools: Path, url: str, users: int, seconds: float, tokens: int = 24) -> dict[str, Any]:
    """Runs locust; returns answers per second, latencies in ms and failures by reason."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                str(tools / "locust"), "-f", str(Path(__file__).with_name("locustfile.py")),
                "--headless", "-u", str(users), "-r", str(users), "-t", f"{seconds:.0f}s",
                "--host", url, "--json", "--csv", f"{folder}/out", "--stop-timeout", "60",
            ],
            capture_output=True, text=True, check=False,
            env={**os.environ, "LOAD_MAX_TOKENS": str(tokens)},
        )  # fmt: skip
        if not done.stdout.strip():
            raise RuntimeError(f"locust failed: {done.stderr[-2000:]}")
        (one,) = json.loads(done.stdout)
        failures = Path(f"{folder}/out_failures.csv").read_text(encoding="utf-8").splitlines()[1:]
    taken = one["last_request_timestamp"] - one["start_time"]
    times = sorted(
        float(ms) for ms, count in one["response_times"].items() for _ in range(int(count))
    )
    good = one["num_requests"] - one["num_failures"]
    return {
        "answers": good,
        "rate": good / taken,
        "p50": statistics.median(times),
        "p95": times[int(0.95 * (len(times) - 1))],
        "failures": [line.split(",")[2] + " x " + line.split(",")[3] for line in failures],
    }


def overhead(tools: Path, seconds: float) -> None:
    """Measures the service's own time."""
    with tempfile.TemporaryDirectory() as folder, service(Path(folder), stubs=True) as url:
        locust(tools, url, 1, 5)
        found = locust(tools, url, 1, seconds)
    print(f"overhead: p50 {found['p50']:.0f} ms, p95 {found['p95']:.0f} ms (goal: p50 under 20 ms)")


def load(tools: Path, seconds: float) -> None:
    """Measures throughput by the number of users."""
    rates = {}
    options = ["serve.small.threads=2", "serve.frozen.threads=2", "serve.max_requests=128"]
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), *options, stubs=False) as url,
    ):
        locust(tools, url, 2, 10)
        print("| users | answers a second | p50, s | p95, s | failures |")
        print("|---:|---:|---:|---:|---|")
        for users in USERS:
            found = locust(tools, url, users, seconds)
            rates[users] = found["rate"]
            print(
                f"| {users} | {found['rate']:.2f} | {found['p50'] / 1000:.2f} "
                f"| {found['p95'] / 1000:.2f} | {', '.join(found['failures']) or 'none'} |",
                flush=True,
            )
    print(f"throughput at 16 users over that at 1: {rates[16] / rates[1]:.2f} (goal: 2.5)")


def bound(tools: Path, seconds: float) -> None:
    """Exceeds the limit of requests in flight, then returns below it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), "serve.max_requests=16", "serve.small.threads=2", stubs=False) as url,
    ):
        found = locust(tools, url, 64, seconds)
        print(f"64 users, 16 at once: {found['answers']} answers, refused: {found['failures']}")
        found = locust(tools, url, 4, 10)
        print(f"then 4 users: {found['answers']} answers, refused: {found['failures'] or 'none'}")


def memory(tools: Path, seconds: float) -> None:
    """Measures the memory of the replicas during 2,000 requests."""
    with tempfile.TemporaryDirectory() as folder, service(Path(folder), stubs=True) as url:
        held: dict[int, list[float]] = {}
        asked = 0
        while asked < 2000:
            asked += locust(tools, url, 8, 8)["answers"]
            held[asked] = [one.memory_full_info().uss / 2**20 for one in _replicas()]
    totals = [sum(values) for values in held.values()]
    quarter = max(1, len(totals) // 4)
    second, last = totals[quarter : 2 * quarter] or totals[:1], totals[-quarter:]
    ratio = statistics.median(last) / statistics.median(second)
    print(
        f"memory: {asked} requests; three replicas hold {totals[0]:.0f} MiB at first, "
        f"{totals[-1]:.0f} at the end; the last quarter over the second: {ratio:.3f}"
    )


def _replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        if "ServeReplica:lmcot" in " ".join(process.cmdline()):
            found.append(process)
    return found


def fuzz(tools: Path, seconds: float) -> None:
    """Sends valid and invalid requests that schemathesis makes from the schema."""
    with tempfile.TemporaryDirectory() as folder, service(Path(folder), stubs=True) as url:
        done = subprocess.run(
            [
                str(tools / "schemathesis"), "run", f"{url}/openapi.json", "--max-examples", "60",
                "--checks", "not_a_server_error", "--seed", "1", "--exclude-path", "/metrics",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    print(f"fuzz: schemathesis ended with {done.returncode}")
    print("\n".join(done.stdout.splitlines()[-25:]))


def main() -> None:
    """Runs the requested parts."""
    parts = {
        "overhead": overhead, "load": load, "bound": bound, "memory": memory, "fuzz": fuzz,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description="The service under load.")
    parser.add_argument("--tools", type=Path, required=True, help="folder of locust's command")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    options = parser.parse_args()
    for name in options.parts:
        started = time.monotonic()
        parts[name](options.tools, options.seconds)
        print(f"({name}: {time.monotonic() - started:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
