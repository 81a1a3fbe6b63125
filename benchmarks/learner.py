"""Measures how much of the machine a PPO update uses.

    LMCOT_DATA=FOLDER python -m benchmarks.learner [--model smollm2|t5] [--repeats 3]

FOLDER holds ``hotpotqa-train.jsonl.gz`` (questions in lmcot's own format); without it lmcot's own
sample is used. Prompts are questions with contexts of mixed lengths and four responses each, which
are supporting sentences cut at random. It prints ratios of medians, timed in turns in one process,
and the peak resident memory of each task, measured in a separate process:

- a whole update (old and reference passes, forward and backward, Adam) against a plain padded
  loop in order of arrival, with logits at all positions: the same work, so the ratio of their
  times is that of their non-padding tokens per second;
- the update's rate of floating-point operations against that of a bare forward and backward pass
  over the same tensors, counting both in forward passes (update: 5, bare: 3);
- one optimiser step of the engine against one in bare torch, at accumulation 1 and 8.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from benchmarks.cases import MODELS, Case, load_case
from benchmarks.timing import medians, own_peak, peak_memory
from lmcot.learner.batching import MicroBatch
from lmcot.learner.engine import TrainEngine
from lmcot.learner.plan import refine_plan
from lmcot.learner.session import LearnerSession
from lmcot.models.batches import pad_left, pad_right
from lmcot.models.policy import Policy, disable_dropout, response_logits
from lmcot.models.sequences import SequenceBatch
from lmcot.models.sources import load_model
from lmcot.process import use_threads

ROWS = 4
"""Responses per micro-batch of the plain loop."""


@dataclass
class Bench:
    """The tasks that are timed, each on its own models."""

    case: Case

    @cached_property
    def session(self) -> LearnerSession:
        """Builds the learner."""
        return LearnerSession(
            self.case.config, refine_plan(self.case.config, self.case.source, 1000)
        )

    @cached_property
    def plain(self) -> tuple[PreTrainedModel, PreTrainedModel, torch.optim.Optimizer]:
        """Builds the policy, reference and Adam of the plain loop."""
        lm, _ = load_model(self.case.source, "float32")
        disable_dropout(lm)
        reference = copy.deepcopy(lm).requires_grad_(False)
        return lm, reference, torch.optim.AdamW(lm.parameters(), lr=1e-6, fused=True)

    @cached_property
    def laid_out(self) -> list[SequenceBatch]:
        """The micro-batches of the update, as tensors."""
        planner = self.session._planner
        pairs = self.case.pairs
        plan = planner.plan(pairs, range(len(pairs)))
        return [planner.lay_out(pairs, micro) for micro in plan]

    def update(self) -> None:
        """Runs one PPO step."""
        self.session.ppo.step(self.case.scored, 0)

    def plain_update(self) -> None:
        """Does the same work as a plain implementation: padded, in order of arrival."""
        lm, reference, adam = self.plain
        pairs, loss_tokens = self.case.pairs, sum(len(r) for _, r in self.case.pairs)
        chunks = [pairs[start : start + ROWS] for start in range(0, len(pairs), ROWS)]
        with torch.no_grad():
            old = [_plain_logprobs(lm, chunk) for chunk in chunks]
            for chunk in chunks:
                _plain_logprobs(reference, chunk)
        for chunk, before in zip(chunks, old, strict=True):
            now = _plain_logprobs(lm, chunk)
            ((now - before).exp() * 0.1).sum().div(loss_tokens).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    def bare(self) -> None:
        """Runs only forward and backward passes over the update's own tensors."""
        lm = self.plain[0]
        for batch in self.laid_out:
            response_logits(lm, batch)[0].float().logsumexp(-1).sum().backward()
        lm.zero_grad()

    def engine_step(self, accumulation: int) -> None:
        """Runs one optimiser step of the engine."""
        engine: TrainEngine = self.session._engine
        for batch in self._some(accumulation):
            logits, _ = engine.forward(batch, values=False)
            engine.backward(logits.float().logsumexp(-1).sum() / 1000)
        engine.step()

    def torch_step(self, accumulation: int) -> None:
        """Runs the same optimiser step in bare torch."""
        lm, _, adam = self.plain
        policy = Policy(lm)
        for batch in self._some(accumulation):
            logits, _ = policy(batch, values=False)
            (logits.float().logsumexp(-1).sum() / 1000).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    def _some(self, number: int) -> list[SequenceBatch]:
        """A number of micro-batches of a few hundred tokens."""
        planner, pairs = self.session._planner, self.case.pairs
        return [
            planner.lay_out(pairs, MicroBatch(((index % len(pairs),),))) for index in range(number)
        ]


def _plain_logprobs(lm: PreTrainedModel, chunk: Sequence[Any]) -> Tensor:
    """Log-probabilities [rows, response] of padded rows, including padding, which costs time."""
    responses, mask = pad_right([response for _, response in chunk], 0)
    if lm.config.is_encoder_decoder:
        ids, seen = pad_right([prompt for prompt, _ in chunk], 0)
        start = torch.full_like(responses[:, :1], lm.config.decoder_start_token_id)
        decoder = torch.cat([start, responses[:, :-1]], dim=1)
        logits = lm(input_ids=ids, attention_mask=seen, decoder_input_ids=decoder).logits
    else:
        prompts, before = pad_left([prompt for prompt, _ in chunk], 0)
        ids, seen = torch.cat([prompts, responses], 1), torch.cat([before, mask], 1)
        positions = (seen.cumsum(-1) - 1).clamp_min(0)
        out = lm(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False)
        logits = out.logits[:, prompts.shape[1] - 1 : -1]
    return log_softmax(logits.float(), -1).gather(-1, responses.unsqueeze(-1)).squeeze(-1) * mask


Timed = dict[str, Callable[[Bench], None]]
TIMED: Timed = {
    "update": Bench.update,
    "plain update": Bench.plain_update,
    "bare forward and backward": Bench.bare,
    "engine, accumulation 1": lambda bench: bench.engine_step(1),
    "torch, accumulation 1": lambda bench: bench.torch_step(1),
    "engine, accumulation 8": lambda bench: bench.engine_step(8),
    "torch, accumulation 8": lambda bench: bench.torch_step(8),
}


def _seconds(bench: Bench, names: Sequence[str], repeats: int) -> dict[str, float]:
    return medians({name: partial(TIMED[name], bench) for name in names}, repeats)


def report(model: str, repeats: int) -> None:
    """Times all tasks for one model and prints the ratios."""
    bench = Bench(load_case(model))
    tokens = sum(len(prompt) + len(response) for prompt, response in bench.case.pairs)
    print(f"\n## {bench.case.name}: {len(bench.case.pairs)} responses, {tokens} tokens")
    seconds = _seconds(bench, ["update", "plain update", "bare forward and backward"], repeats)
    for number in (1, 8):
        names = [f"engine, accumulation {number}", f"torch, accumulation {number}"]
        seconds |= _seconds(bench, names, 2 * repeats)
    gain = seconds["plain update"] / seconds["update"]
    rate = 5 / 3 * seconds["bare forward and backward"] / seconds["update"]
    print(f"\nnon-padding tokens per second, update over plain update: {gain:.2f}")
    print(f"rate of operations, update over bare forward and backward: {rate:.2f}")
    for number in (1, 8):
        ratio = seconds[f"engine, accumulation {number}"] / seconds[f"torch, accumulation {number}"]
        print(f"time of an optimiser step, engine over torch, accumulation {number}: {ratio:.2f}")
    del bench  # its memory is needed
    print("\n| what | seconds | peak memory, GiB |\n|---|---|---|")
    for name in TIMED:
        peak = peak_memory("benchmarks.learner", "--model", model, "--peak", name)
        print(f"| {name} | {seconds[name]:.2f} | {peak:.2f} |", flush=True)


def main() -> None:
    """Runs the benchmark, or one task to measure its memory."""
    parser = argparse.ArgumentParser(description="How much of the machine a PPO update uses.")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", choices=TIMED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_threads(threads=torch.get_num_threads())
    random.seed(0)
    if arguments.peak:
        bench = Bench(load_case(arguments.model[0]))
        TIMED[arguments.peak](bench)
        print(own_peak())
        return
    for model in arguments.model or MODELS:
        report(model, arguments.repeats)


if __name__ == "__main__":
    main()
