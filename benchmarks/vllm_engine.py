"""Compares vLLM with lmcot's own engine and with transformers' padded `generate()`.

    .venv-vllm/bin/python -m benchmarks.vllm_engine [--questions 16] [--tokens 64] [--dtype float32]

SmolLM2-135M writes four rationales for each question, whose prompt holds its gold paragraphs. Each
engine runs in a process of its own, which prints tokens a second, the engine's peak of resident
memory, and for vLLM the seconds that it takes to take up new weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.cases import SMOLLM2
from benchmarks.generation import SAMPLES, Bench, Load
from benchmarks.timing import own_peak
from lmcot.config import VllmSettings
from lmcot.models.generation.requests import SampleRequest
from lmcot.models.generation.shared import SharedEngine
from lmcot.models.generation.vllm_engine import VllmEngine
from lmcot.models.sources import saved_tensors
from lmcot.process import use_threads

ENGINES = ("vllm", "own", "generate")


def measure(engine: str, load: Load, dtype: str, threads: int) -> None:
    """Times one engine after a first call, and prints what it took."""
    use_threads(threads)
    bench = Bench("smollm2", "float32" if dtype == "float32" else "bfloat16")
    if engine != "vllm":
        call = bench.sample if engine == "own" else bench.generate
        call(Load(1, 1, 4))
        seconds = _seconds(lambda: call(load))
        _tell(engine, load, seconds)
        return
    vllm = VllmEngine(SMOLLM2, "float32" if dtype == "float32" else "bfloat16", VllmSettings())
    shared = SharedEngine(vllm)
    requests = [
        SampleRequest(prompt, range(SAMPLES), load.tokens)
        for prompt in bench.prompts[: load.questions]
    ]
    _tell(engine, load, _seconds(lambda: shared.sample(requests)))
    tensors = dict(saved_tensors(SMOLLM2))
    print(f"vllm: new weights in {_seconds(lambda: vllm.load(tensors.items())):.2f} s", flush=True)
    shared.close()
    vllm.close()


def _seconds(call: object) -> float:
    assert callable(call)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _tell(engine: str, load: Load, seconds: float) -> None:
    written = load.questions * load.samples * load.tokens
    print(f"{engine}: {written / seconds:.0f} tokens a second, {own_peak():.2f} GiB", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", choices=ENGINES, help="measure this one in this process")
    given = parser.parse_args()
    load = Load(given.questions, SAMPLES, given.tokens)
    if given.engine:
        measure(given.engine, load, given.dtype, given.threads)
        return
    for engine in ENGINES:
        command = [sys.executable, "-m", "benchmarks.vllm_engine", *sys.argv[1:]]
        subprocess.run([*command, "--engine", engine], check=True)


if __name__ == "__main__":
    main()
