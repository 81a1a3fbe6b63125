"""How well requests to an OpenAI-compatible endpoint overlap.

    python -m benchmarks.endpoint [--requests 64] [--concurrency 32]

The endpoint is a process of its own that takes 300 ms for each reply. Printed is the time of all
requests as a ratio to that of one, measured in the same run: the median of five, and each. The
least that there can be is the number of requests over the concurrency.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import uvicorn
from fastapi import FastAPI, Request, Response

from lmcot.config import OpenAIFrozen
from lmcot.frozen.openai.backend import OpenAILM
from lmcot.records import Completion, Message, Sampling

DELAY_S = 0.3
REPEATS = 5
SAMPLING = Sampling(max_new_tokens=8)


@contextmanager
def serving(delay_s: float) -> Iterator[str]:
    """The address of an endpoint that answers "yes" to every request after a delay."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=[there, delay_s], daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        server.terminate()
        server.join()


def _serve(told: Connection, delay_s: float) -> None:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def reply(request: Request) -> Response:
        await request.body()
        await asyncio.sleep(delay_s)
        choice = {"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        return Response(json.dumps({"choices": [choice]}), media_type="application/json")

    # The server chooses a free port and reports it once it has started.
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        told.send(server.servers[0].sockets[0].getsockname()[1])
        await serving

    asyncio.run(run())


def _time(lm: OpenAILM, requests: int) -> float:
    """Seconds that a number of requests take."""
    prompts = [(Message("user", f"Question {number}"),) for number in range(requests)]
    started = time.perf_counter()
    found = lm.generate(prompts, SAMPLING)
    taken = time.perf_counter() - started
    failed = [one for one in found if not isinstance(one, Completion)]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first of them: {failed[0]}")
    return taken


def measure(url: str, requests: int, concurrency: int) -> list[float]:
    """Ratio of the time of all requests to that of one, per repeat, after one warm-up."""
    lm = OpenAILM(
        OpenAIFrozen(
            backend="openai", base_url=url, model="m", concurrency=concurrency, max_retries=0
        )
    )
    _time(lm, concurrency)
    ratios = []
    for _ in range(REPEATS):
        one = _time(lm, 1)
        ratios.append(_time(lm, requests) / one)
    lm.close()
    return ratios


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args()
    with serving(DELAY_S) as url:
        ratios = measure(url, options.requests, options.concurrency)
    print(
        f"{options.requests} requests at concurrency {options.concurrency} take "
        f"{statistics.median(ratios):.2f} times one ({', '.join(f'{one:.2f}' for one in ratios)})"
    )


if __name__ == "__main__":
    main()
