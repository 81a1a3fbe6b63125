"""Compares the memory of a learner that distils a model in bfloat16 with a bare torch loop.

    python -m benchmarks.learner_memory [--steps 40] [--layers 30] [--tokens 4096]

SmolLM2-135M, or its first few layers, learns the supporting facts of HotpotQA's questions, with
eight rationales of varying lengths per step. The benchmark prints GiB of resident memory after
the third step, after the last step and at the peak. The bare loop does the same forward and
backward passes and steps with torch's AdamW; it keeps bfloat16 moments, the learner a float32 copy
of the parameters, gradients and moments, and the table separates the two. Each runs in its own
process.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.cases import SMOLLM2
from benchmarks.timing import own_peak
from lmcot.config import Config, SampleData, parse_config
from lmcot.data.context import apply_context
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode, encode_continuation
from lmcot.learner.batching import BatchPlanner, TokenPair
from lmcot.models.policy import Policy, disable_dropout
from lmcot.models.sources import load_model, load_tokenizer, save_model
from lmcot.process import use_threads

WAYS = ("learner", "bare")
BATCH = 8
EARLY = 3
"""The step after which memory is first measured; by then all lasting memory is allocated."""
_LONGEST = 128

Step = Callable[[Sequence[TokenPair]], object]


@dataclass(frozen=True)
class Held:
    """Resident memory in GiB."""

    early: float
    late: float
    peak: float
    parameters: int


def measure(way: str, source: str, steps: int, tokens: int, dtype: str) -> Held:
    """Measures the learner or the bare loop in a separate process."""
    command = [sys.executable, "-m", "benchmarks.learner_memory", "--way", way, "--source", source]
    sizes = ["--steps", str(steps), "--tokens", str(tokens), "--dtype", dtype]
    done = subprocess.run([*command, *sizes], stdout=subprocess.PIPE, text=True, check=True)
    return Held(**json.loads(done.stdout.splitlines()[-1]))


def first_layers(count: int, folder: Path) -> str:
    """SmolLM2 with only its first layers, which is fast and keeps widths and vocabulary."""
    model, tokenizer = load_model(SMOLLM2, "bfloat16")
    trunk = model.model
    trunk.layers = trunk.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    save_model(model, tokenizer, folder)
    return str(folder)


def _config(source: str, tokens: int, dtype: str) -> Config:
    data = {"kind": "sample", "split": "train"}
    context = {"distractors": 1, "max_tokens": tokens // BATCH}
    return parse_config(
        {
            "data": {"train": data, "validation": data, "context": context},
            "policy": {"source": source, "dtype": dtype},
            "rewards": {"kind": "increasing"},
            "refine": {"start_from": "base"},
            "learner": {"zero_stage": 1, "tokens_per_micro_batch": tokens},
        }
    )


def _batches(config: Config, steps: int) -> Iterator[list[TokenPair]]:
    tokenizer = load_tokenizer(config.policy.source)
    examples = load_examples(SampleData(kind="sample", split="train"), limit=None).examples
    templates, pairs = load_templates("default"), []
    for one in apply_context(
        examples, config.data.context, lambda text: len(tokenizer.encode(text))
    ):
        prompt = encode(templates.rationale(one), tokenizer)
        facts = " ".join(one.gold_sentences())
        response = encode_continuation(prompt, facts, tokenizer, encoder_decoder=False)
        pairs.append((tuple(prompt), (*response[: _LONGEST - 1], tokenizer.eos_token_id)))
    chooser = random.Random(0)
    for _ in range(steps):
        yield chooser.sample(pairs, BATCH)


def _learner(config: Config) -> Step:
    from lmcot.learner.plan import distill_plan
    from lmcot.learner.session import LearnerSession

    plan = distill_plan(config, config.policy.source, 1000)
    return LearnerSession(config, plan).distiller.step


def _bare(config: Config) -> Step:
    lm, tokenizer = load_model(config.policy.source, config.policy.dtype)
    disable_dropout(lm)
    policy = Policy(lm).train()
    adam = torch.optim.AdamW(lm.parameters(), lr=3e-5, fused=True)
    budget = config.learner.tokens_per_micro_batch
    planner = BatchPlanner(pad_id=tokenizer.pad_token_id, start_id=None, budget=budget, share=True)

    def step(pairs: Sequence[TokenPair]) -> None:
        for micro in planner.plan(pairs, range(len(pairs))):
            batch = planner.lay_out(pairs, micro)
            logits, _ = policy(batch, values=False)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def _run(way: str, source: str, steps: int, tokens: int, dtype: str) -> Held:
    config = _config(source, tokens, dtype)
    step = _learner(config) if way == "learner" else _bare(config)
    held = []
    for pairs in _batches(config, steps):
        step(pairs)
        held.append(psutil.Process().memory_info().rss / 2**30)
    model, _ = load_model(source, "bfloat16")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Held(held[EARLY - 1], held[-1], own_peak(), parameters)


def state_gib(parameters: int) -> float:
    """GiB of the learner's float32 copy, gradients and moments beyond bfloat16 moments."""
    return parameters * (4 * 4 - 2 * 2) / 2**30


def main() -> None:
    """Prints the table, or the figures of one measurement."""
    parser = argparse.ArgumentParser(description="Memory of a learner beside a bare loop.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", help="slow without units for it")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        use_threads(threads=torch.get_num_threads())
        sizes = given.steps, given.tokens, given.dtype
        print(json.dumps(asdict(_run(given.way, given.source, *sizes))))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = first_layers(given.layers, Path(folder) / "model")
        found = {way: measure(way, source, given.steps, given.tokens, given.dtype) for way in WAYS}
    print(f"| GiB | step {EARLY} | step {given.steps} | peak |\n|---|---|---|---|")
    for way, held in found.items():
        print(f"| {way} | {held.early:.2f} | {held.late:.2f} | {held.peak:.2f} |")
    bare, learner = found["bare"], found["learner"]
    room = bare.peak + state_gib(bare.parameters)
    print(f"peak, over the bare loop's with the optimiser's state: {learner.peak / room:.2f}")


if __name__ == "__main__":
    main()
