"""Compares the generation engine with transformers' `generate()` and with its matrix products.

    LMCOT_DATA=FOLDER python -m benchmarks.generation [--model smollm2|t5] [--dtype bfloat16]
        [--repeats 3]

FOLDER holds ``hotpotqa-train.jsonl.gz`` (questions in lmcot's own format); without it lmcot's own
sample is used. The 16 prompts are questions with their gold paragraphs. The benchmark prints ratios
of medians, timed in turns in one process; the peak resident memory of each task, in a separate
process; and a profile of the engine's operators. ``--dtype auto``, the default, is
bfloat16 where the processor supports it, else float32.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, get_args

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.cases import MODELS, SMOLLM2, questions, t5_small
from benchmarks.timing import medians, own_peak, peak_memory
from lmcot.config import ASPECTS, Dtype
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode
from lmcot.models.batches import pad_left, pad_right
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import SampleRequest, ScoreRequest
from lmcot.models.sources import load_model, load_tokenizer
from lmcot.process import use_threads
from lmcot.records import Example

QUESTIONS, SAMPLES, TOKENS = 16, 4, 64
SHORTEST, LONGEST = 8, 128


class Load(NamedTuple):
    """The amount of text to generate."""

    questions: int
    samples: int
    tokens: int
    varied: bool = False


WHOLE = Load(QUESTIONS, SAMPLES, TOKENS)
VARIED = Load(QUESTIONS, SAMPLES, LONGEST, varied=True)
ALONE = Load(1, 1, TOKENS)


def own_length(tokens: Any) -> int:
    """A length between the shortest and the longest, which a sample's first token determines."""
    return SHORTEST + int(tokens[0]) * 7919 % (LONGEST - SHORTEST + 1)


class _OwnLength(StoppingCriteria):
    def __init__(self, prompt: int) -> None:
        self._prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        written = input_ids[:, self._prompt :]
        return torch.tensor([len(row) >= own_length(row) for row in written])


class Bench:
    """One model and the tasks that it is timed on."""

    def __init__(self, model: str, dtype: Dtype) -> None:
        source = SMOLLM2 if model == "smollm2" else str(t5_small())
        self.model, tokenizer = load_model(source, dtype)
        self.pad_id = int(tokenizer.pad_token_id)
        self.tokenizer = load_tokenizer(SMOLLM2)
        self.templates = load_templates("default")
        self.examples = [
            _gold_only(one) for one in load_examples(questions(), limit=QUESTIONS).examples
        ]
        self.prompts = [
            self._ids(encode(self.templates.rationale(one), self.tokenizer))
            for one in self.examples
        ]

    def _ids(self, ids: list[int]) -> list[int]:
        return [token % int(self.model.config.vocab_size) for token in ids]

    @cached_property
    def engine(self) -> GenerationEngine:
        """Builds the generation engine."""
        return GenerationEngine(self.model, pad_id=self.pad_id)

    def sample(self, load: Load) -> None:
        """Samples with the engine."""
        stop = (lambda ids: len(ids) >= own_length(ids)) if load.varied else None
        self.engine.sample(
            [
                SampleRequest(prompt, range(load.samples), load.tokens, stop=stop)
                for prompt in self.prompts[: load.questions]
            ]
        )

    @torch.inference_mode()
    def generate(self, load: Load) -> None:
        """Samples the same with transformers."""
        pad = pad_right if self.model.config.is_encoder_decoder else pad_left
        ids, mask = pad(self.prompts[: load.questions], self.pad_id)
        read = 1 if self.model.config.is_encoder_decoder else ids.shape[1]
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=load.tokens,
            num_return_sequences=load.samples,
            pad_token_id=self.pad_id,
            decoder_start_token_id=self.model.config.decoder_start_token_id
            if self.model.config.is_encoder_decoder
            else None,
        )
        self.model.generation_config.eos_token_id = None
        model: Any = self.model
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_OwnLength(read)] if load.varied else []),
        )

    def begin_decoding(self) -> None:
        """Reads all prompts, so that only decoding remains."""
        for prompt in self.prompts:  # more tokens than are timed
            self.engine.submit(SampleRequest(prompt, range(SAMPLES), 256))
        rows = QUESTIONS * SAMPLES
        while sum(event.__class__.__name__ == "TokenEvent" for event in self.engine.step()) < rows:
            pass

    def decode(self) -> None:
        """Decodes eight steps of all rows."""
        for _ in range(8):
            self.engine.step()

    @torch.inference_mode()
    def products(self) -> None:
        """Computes only the matrix products of eight steps of all rows."""
        for _ in range(8):
            for weight, given in self._weights:
                torch.nn.functional.linear(given, weight)

    @cached_property
    def _weights(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        part = self.model.get_decoder() if self.model.config.is_encoder_decoder else self.model
        layers = [m for m in part.modules() if isinstance(m, torch.nn.Linear)]
        output = self.model.get_output_embeddings()
        layers = [layer for layer in layers if layer is not output] + [output]
        rows = QUESTIONS * SAMPLES
        return [
            (layer.weight, torch.randn(rows, layer.in_features, dtype=layer.weight.dtype))
            for layer in layers
        ]

    def judge(self, questions: int) -> None:
        """Scores a number of yes-or-no questions on the rationale of one example."""
        example = self.examples[0]
        rationale = " ".join(example.gold_sentences())
        options = [self.tokenizer.encode(word)[:1] for word in (" yes", " no")]
        asked = [
            encode(self.templates.judge(example, rationale, aspect), self.tokenizer)
            for aspect in islice(ASPECTS, questions)
        ]
        self.engine.score([ScoreRequest(self._ids(ids), options) for ids in asked])


Things = dict[str, Callable[[], None]]


def things(bench: Bench, model: str) -> Things:
    """The tasks whose time and memory are measured."""
    found: Things = {
        "engine, alone": partial(bench.sample, ALONE),
        "generate(), alone": partial(bench.generate, ALONE),
        "engine, 16 x 4 x 64": partial(bench.sample, WHOLE),
        "generate(), 16 x 4 x 64": partial(bench.generate, WHOLE),
        "engine, 8 to 128 tokens": partial(bench.sample, VARIED),
        "generate(), 8 to 128 tokens": partial(bench.generate, VARIED),
    }
    if model == "smollm2":
        found["eight judge questions"] = partial(bench.judge, 8)
        found["one judge question"] = partial(bench.judge, 1)
    return found


def report(model: str, dtype: Dtype, repeats: int) -> None:
    """Times all tasks for one model and prints the ratios."""
    bench = Bench(model, dtype)
    lengths = [len(prompt) for prompt in bench.prompts]
    print(
        f"\n## {model}, {bench.model.dtype}: {QUESTIONS} prompts of {min(lengths)} to "
        f"{max(lengths)} tokens"
    )
    timed = things(bench, model)
    names = list(timed)
    rows: list[tuple[str, float]] = []
    for first, second in zip(names[::2], names[1::2], strict=True):
        pair = {first: timed[first], second: timed[second]}
        # The first pair is quick and warms up for the others.
        seconds = medians(pair, repeats, warm_up=first == names[0])
        rows.extend(seconds.items())
        ratio = seconds[second] / seconds[first]
        if first.startswith("engine"):
            print(f"{first}: {ratio:.2f} times as fast as generate()", flush=True)
        else:
            print(f"{first} cost {1 / ratio:.2f} times {second}", flush=True)
        if first == "engine, 16 x 4 x 64":
            written = QUESTIONS * SAMPLES * TOKENS / seconds[first]
            print(f"{first}: {written:.0f} tokens a second", flush=True)
    bench.begin_decoding()
    decoding = medians({"steps": bench.decode, "products": bench.products}, 2 * repeats)
    ratio = decoding["steps"] / decoding["products"]
    print(
        f"decoding alone takes {ratio:.2f} times its matrix products' time "
        f"({decoding['products'] / 8 * 1e3:.0f} ms a step)"
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        bench.decode()
    print(
        profiled.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40
        )
    )
    print("\n| what | seconds | peak memory, GiB |\n|---|---|---|")
    for name, taken in rows:
        peak = peak_memory(
            "benchmarks.generation", "--model", model, "--dtype", dtype, "--peak", name
        )
        print(f"| {name} | {taken:.2f} | {peak:.2f} |", flush=True)


def main() -> None:
    """Runs the benchmark, or one task to measure its memory."""
    parser = argparse.ArgumentParser(description="How fast the generation engine is.")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_threads(threads=torch.get_num_threads())
    if arguments.peak:
        bench = Bench(arguments.model[0], arguments.dtype)
        things(bench, arguments.model[0])[arguments.peak]()
        print(own_peak())
        return
    for model in arguments.model or MODELS:
        report(model, arguments.dtype, arguments.repeats)


def _gold_only(example: Example) -> Example:
    named = {fact.title for fact in example.supporting_facts}
    gold = tuple(paragraph for paragraph in example.context if paragraph.title in named)
    return dataclasses.replace(example, context=gold)


if __name__ == "__main__":
    main()
