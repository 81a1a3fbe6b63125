"""Compares vLLM with lmcot's own engine and with transformers' `generate()`, in one process.

    LMCOT_DATA=FOLDER .venv-vllm/bin/python -m benchmarks.engines [--dtype bfloat16] [--repeats 3]
        [--cpu] [--without-generate]

SmolLM2-135M samples four rationales of 64 tokens for each of 16 questions with their gold
paragraphs; then it answers eight yes-or-no questions on each of four rationales; then vLLM takes
the weights of a new version. All tasks run in turns, and the benchmark prints medians. With
``--cpu`` each task has one thread and CPU seconds are counted, for a machine with other work to do.
Memory is not compared, since one process holds both models.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import islice
from typing import get_args

from benchmarks.cases import SMOLLM2
from benchmarks.generation import QUESTIONS, SAMPLES, TOKENS, WHOLE, Bench
from benchmarks.timing import medians
from lmcot.config import ASPECTS, Dtype, VllmSettings
from lmcot.data.render import encode
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import SampleRequest, ScoreRequest
from lmcot.models.generation.shared import SharedEngine
from lmcot.models.generation.vllm_engine import VllmEngine
from lmcot.models.sources import resolve_dtype
from lmcot.process import use_threads
from lmcot.records import Failure

JUDGED = 4
"""Questions whose rationales are judged."""


def tasks(bench: Bench, vllm: VllmEngine) -> dict[str, Callable[[], None]]:
    """What is timed."""
    shared = SharedEngine(vllm)
    requests = [SampleRequest(prompt, range(SAMPLES), TOKENS) for prompt in bench.prompts]
    options = [bench.tokenizer.encode(word)[:1] for word in (" yes", " no")]
    judged = [
        ScoreRequest(encode(text, bench.tokenizer), options)
        for example in islice(bench.examples, JUDGED)
        for text in (
            bench.templates.judge(example, " ".join(example.gold_sentences()), aspect)
            for aspect in ASPECTS
        )
    ]

    def sample(engine: GenerationEngine | SharedEngine) -> None:
        for one in engine.sample(requests):
            assert not isinstance(one, Failure), one
            assert [len(each.response_ids) for each in one] == [TOKENS] * SAMPLES

    def judge(engine: GenerationEngine | SharedEngine) -> None:
        assert not any(isinstance(one, Failure) for one in engine.score(judged))

    return {
        "generate()": lambda: bench.generate(WHOLE),
        "rollouts, lmcot": lambda: sample(bench.engine),
        "rollouts, vLLM": lambda: sample(shared),
        "judging, lmcot": lambda: judge(bench.engine),
        "judging, vLLM": lambda: judge(shared),
        "new weights, vLLM": lambda: vllm.load(bench.model.named_parameters()),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="vLLM beside lmcot's own engine.")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds, with one thread")
    parser.add_argument("--without-generate", action="store_true")
    options = parser.parse_args()
    use_threads(1 if options.cpu else 2)
    vllm = VllmEngine(SMOLLM2, options.dtype, VllmSettings(cache_gib=1.0, max_context=2048))
    things = tasks(Bench("smollm2", options.dtype), vllm)
    if options.without_generate:
        del things["generate()"]
    clock = time.process_time if options.cpu else time.perf_counter
    found = medians(things, options.repeats, clock=clock)
    unit = "CPU seconds" if options.cpu else "seconds"
    print(f"\n{str(resolve_dtype(options.dtype)).removeprefix('torch.')}, medians in {unit}\n")
    print("| task | seconds | tokens a second |\n|---|---|---|")
    for name, seconds in found.items():
        sampling = not name.startswith(("judging", "new"))
        speed = f"{QUESTIONS * SAMPLES * TOKENS / seconds:.0f}" if sampling else ""
        print(f"| {name} | {seconds:.2f} | {speed} |")


if __name__ == "__main__":
    main()
