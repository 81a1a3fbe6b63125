"""Measures how fast distillation trains, beside the plain loop that anybody would write.

    LMCOT_DATA=FOLDER python -m benchmarks.distillation [--steps 3] [--repeats 3] [--cpu]

FOLDER holds ``hotpotqa-train.jsonl.gz`` (questions in lmcot's own format); without it lmcot's own
sample is used. SmolLM2-135M learns rationales made of the supporting facts, eight in an optimiser
step, in bfloat16 where the machine computes in it. Both loops take the same steps in turns, in one
process:

- lmcot's learner, at ZeRO stage 0 and with its default micro-batches;
- torch and transformers: a step is one batch in order of arrival, padded to its longest row, with
  the model's own loss, then clipping and AdamW.

It prints the padding of both, medians of tokens per second without padding, and their ratio. With
``--cpu`` each loop has one thread and CPU seconds are counted, for a machine with other work to do.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from transformers import PreTrainedModel

from benchmarks.cases import SMOLLM2, questions
from benchmarks.timing import medians
from lmcot.config import Config, parse_config
from lmcot.data.context import apply_context
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode_continuation, rationale_ids
from lmcot.data.sampler import PromptSampler
from lmcot.learner.batching import TokenPair
from lmcot.learner.plan import distill_plan
from lmcot.learner.session import LearnerSession
from lmcot.models.batches import pad_right
from lmcot.models.policy import disable_dropout
from lmcot.models.sources import load_model, load_tokenizer, resolve_dtype
from lmcot.process import use_threads

IGNORED = -100
"""The label that transformers leaves out of its loss."""


class Bench:
    """Both loops, each on a model of its own."""

    def __init__(self, steps: int, size: int) -> None:
        self.config = _config()
        pairs = _pairs(self.config, steps * size)
        self.batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and rationales."""
        return sum(len(ids) for batch in self.batches for pair in batch for ids in pair)

    @cached_property
    def session(self) -> LearnerSession:
        """lmcot's learner."""
        return LearnerSession(self.config, distill_plan(self.config, SMOLLM2, 1000))

    @cached_property
    def plain(self) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
        """The plain loop's model and its Adam."""
        lm = copy.deepcopy(load_model(SMOLLM2, self.config.policy.dtype)[0]).train()
        disable_dropout(lm)
        return lm, torch.optim.AdamW(lm.parameters(), lr=1e-6, fused=True)

    def learn(self) -> None:
        """Takes all steps with lmcot's learner."""
        for batch in self.batches:
            self.session.distiller.step(batch)

    def learn_plainly(self) -> None:
        """Takes all steps with the plain loop."""
        lm, adam = self.plain
        for batch in self.batches:
            ids, mask = pad_right([[*prompt, *response] for prompt, response in batch], 0)
            labels, _ = pad_right(
                [[*[IGNORED] * len(prompt), *response] for prompt, response in batch], IGNORED
            )
            lm(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            adam.step()
            adam.zero_grad()

    def plain_places(self) -> int:
        """Places of the plain loop's padded batches."""
        return sum(len(batch) * max(map(_length, batch)) for batch in self.batches)

    def places(self) -> int:
        """Places of the learner's padded micro-batches."""
        planner = self.session._planner
        return sum(
            planner.lay_out(batch, micro).ids.numel()
            for batch in self.batches
            for micro in planner.plan(batch, range(len(batch)))
        )


def _length(pair: TokenPair) -> int:
    return len(pair[0]) + len(pair[1])


def _config() -> Config:
    return parse_config(
        {
            "data": {
                "train": questions(),
                "validation": questions(),
                "context": {"distractors": 0},
            },
            "policy": {"source": SMOLLM2},
            "rewards": {"kind": "increasing"},
            "refine": {"start_from": "base"},
            "distill": {"optimiser": {"learning_rate": 1e-6}},
            "learner": {"zero_stage": 0},
        }
    )


def _pairs(config: Config, count: int) -> list[TokenPair]:
    """Prompts and rationales as `lmcot distill` learns them, in the order of its sampler."""
    tokenizer, templates = load_tokenizer(SMOLLM2), load_templates("default")
    loaded = load_examples(config.data.train, limit=4 * count).examples
    examples = apply_context(loaded, config.data.context, lambda text: len(tokenizer.encode(text)))
    eos = tokenizer.eos_token_id
    pairs: list[TokenPair] = []
    for row in PromptSampler(len(examples), 0).next(min(count, len(examples))):
        example = examples[row]
        prompt = rationale_ids(example, templates, tokenizer, "auto")
        text = f"{' '.join(example.gold_sentences())} So the answer is {example.answer}."
        ids = encode_continuation(prompt, text, tokenizer, encoder_decoder=False)
        pairs.append((prompt, (*ids, eos)))
    return pairs


def report(steps: int, size: int, repeats: int, clock: Callable[[], float]) -> float:
    """Times both loops, and prints and returns the ratio of their speeds."""
    bench = Bench(steps, size)
    dtype = resolve_dtype(bench.config.policy.dtype)
    seconds = medians({"lmcot": bench.learn, "plain": bench.learn_plainly}, repeats, clock=clock)
    rows: Sequence[tuple[str, int]] = (("lmcot", bench.places()), ("plain", bench.plain_places()))
    print(
        f"SmolLM2-135M, {dtype}, {torch.get_num_threads()} threads: {steps} steps of {size} "
        f"rationales, {bench.tokens} tokens of prompts and rationales\n"
    )
    print("| loop | padding | seconds | tokens a second without padding |\n|---|---|---|---|")
    for name, places in rows:
        padding, speed = 1 - bench.tokens / places, bench.tokens / seconds[name]
        print(f"| {name} | {padding:.0%} | {seconds[name]:.2f} | {speed:.0f} |")
    ratio = seconds["plain"] / seconds["lmcot"]
    print(f"\nlmcot over the plain loop: {ratio:.2f}")
    return ratio


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="How fast distillation trains.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", type=int, default=8, help="rationales in a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds with one thread")
    arguments = parser.parse_args()
    use_threads(threads=1 if arguments.cpu else torch.get_num_threads())
    clock = time.process_time if arguments.cpu else time.perf_counter
    report(arguments.steps, arguments.size, arguments.repeats, clock)


if __name__ == "__main__":
    main()
