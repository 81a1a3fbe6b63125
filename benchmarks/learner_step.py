"""Times the phases of a GRPO step inside the learner actor, beside the bare pass on the same rows.

    python -m benchmarks.learner_step [--model smollm2|tiny] [--questions 16] [--layers 30]
        [--dtype auto|float32|bfloat16] [--attention auto|model|fused|products] [--compile]
        [--repeats 3]

Each of the questions has four responses of at most 64 tokens behind one made-up prompt of 180 to
320 tokens, as long as HotpotQA's with their gold paragraphs; one optimiser step has a KL term in
its loss. The bare pass is a plain transformers model: the reference's forward pass, and forward and
backward pass over the very tensors of the step. Both run in turns in one actor, and all numbers are
medians, so that load from elsewhere meets both. Peaks are those of the whole process, which holds
the models of both.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.cases import SMOLLM2
from benchmarks.learner_memory import first_layers
from benchmarks.timing import own_peak
from lmcot.actors.learner_actor import LearnerActor
from lmcot.actors.learner_group import LearnerGroup
from lmcot.actors.resources.cluster import ray_cluster
from lmcot.actors.units import Packed
from lmcot.config import Config, Dtype, Kernel, parse_config
from lmcot.learner.experience import Forward
from lmcot.learner.plan import refine_plan
from lmcot.models.policy import disable_dropout, response_logits
from lmcot.models.sources import load_model, resolve_dtype
from lmcot.records import Judgement, Rollout, ScoredRollout

GOAL = 1.4
SAMPLES, TOKENS = 4, 64
PROMPTS = (180, 320)
"""Shortest and longest prompt."""
UNITS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
PHASES = ("reference pass", "policy forward", "loss", "backward", "optimiser", "the rest")

_Result = TypeVar("_Result")


class Phases:
    """Seconds of each phase; a phase inside another one does not count in the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._name, self._since = "the rest", time.perf_counter()

    def _switch(self, name: str) -> str:
        now, before = time.perf_counter(), self._name
        self.seconds[before] += now - self._since
        self._name, self._since = name, now
        return before

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Counts the block in a phase."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def timed(self, name: str, do: Callable[..., _Result]) -> Callable[..., _Result]:
        """The function, counted in a phase."""

        def call(*arguments: Any, **named: Any) -> _Result:
            with self.of(name):
                return do(*arguments, **named)

        return call


def profile(
    actor: LearnerActor, packed: list[Packed[list[ScoredRollout]]], repeats: int
) -> dict[str, Any]:
    """Takes steps and bare passes in turns; returns the seconds of each turn, and peaks in GiB."""
    bare, _ = load_model(actor._plan.source, actor._config.policy.dtype)
    disable_dropout(bare)
    reference = copy.deepcopy(bare).requires_grad_(False)
    found: dict[str, Any] = {name: [] for name in ("update", "bare", *PHASES)}
    peaks: dict[str, float] = {}
    for turn in range(repeats + 1):
        _forget_peak()
        phases = _step(actor, packed, turn)
        peaks["update"] = max(peaks.get("update", 0.0), own_peak())
        _forget_peak()
        began = time.perf_counter()
        _bare(actor, packed, bare, reference)
        seconds = time.perf_counter() - began
        peaks["bare"] = max(peaks.get("bare", 0.0), own_peak())
        if turn:
            for name, value in phases.items():
                found[name].append(value)
            found["update"].append(sum(phases.values()))
            found["bare"].append(seconds)
    return {"seconds": found, "peaks": peaks, "attention": actor._session.attention.kernel}


def _step(
    actor: LearnerActor, packed: list[Packed[list[ScoredRollout]]], step: int
) -> dict[str, float]:
    """Seconds of each phase of one PPO step."""
    ppo = actor._session.ppo
    engine, maker, objective = ppo._engine, ppo._maker, ppo._objective
    phases = Phases()
    with (
        mock.patch.object(maker, "_reference", _timed_reference(phases, maker._reference)),
        mock.patch.object(maker, "_logprobs", phases.timed("reference pass", maker._logprobs)),
        mock.patch.object(objective, "loss", phases.timed("loss", objective.loss)),
        mock.patch.object(engine, "forward", phases.timed("policy forward", engine.forward)),
        mock.patch.object(engine, "backward", phases.timed("backward", engine.backward)),
        mock.patch.object(engine, "step", phases.timed("optimiser", engine.step)),
        phases.of("the rest"),
    ):
        actor.ppo_step(packed, step)
    return phases.seconds


def _timed_reference(
    phases: Phases, reference: Callable[[], AbstractContextManager[Forward]]
) -> Callable[[], AbstractContextManager[Forward]]:
    @contextmanager
    def ready() -> Iterator[Forward]:
        with reference() as forward:
            yield phases.timed("reference pass", forward)

    return ready


def _bare(
    actor: LearnerActor,
    packed: list[Packed[list[ScoredRollout]]],
    lm: nn.Module,
    reference: nn.Module,
) -> None:
    planner = actor._session._planner
    pairs = [(s.rollout.prompt_ids, s.rollout.response_ids) for one in packed for s in one.open()]
    for micro in planner.plan(pairs, range(len(pairs))):
        batch = planner.lay_out(pairs, micro)
        with torch.no_grad():
            response_logits(reference, batch)
        logits, _ = response_logits(lm, batch)
        cross_entropy(logits.float(), batch.targets).backward()
    lm.zero_grad()


def _forget_peak() -> None:
    """Has the system count this process's peak from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def config(source: str, dtype: str, learner: Mapping[str, Any], threads: int = 2) -> Config:
    """One GRPO update a step, with its KL term in the loss."""
    counting = {"kind": "counting"}
    return parse_config(
        {
            "data": {"train": counting, "validation": counting},
            "policy": {"source": source, "dtype": dtype, "max_new_tokens": TOKENS},
            "rewards": {"kind": "increasing"},
            "refine": {
                "start_from": "base",
                "samples_per_prompt": SAMPLES,
                "advantage": {"kind": "grpo"},
                "kl": {"kind": "fixed", "coefficient": 0.05, "apply_to": "loss"},
                "optimiser": {"learning_rate": 1e-6},
            },
            "learner": learner,
            "actors": {"learner": {"cpus": 0.5, "threads": threads}},
        }
    )


def rollouts(questions: int, vocabulary: int) -> list[ScoredRollout]:
    """Made-up rationales with made-up rewards."""
    chosen = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(chosen.randrange(3, vocabulary) for _ in range(length))

    scored = []
    for question in range(questions):
        prompt = ids(chosen.randint(*PROMPTS))
        for sample in range(SAMPLES):
            response = ids(chosen.randint(TOKENS // 2, TOKENS))
            logprobs = (-1.0,) * len(response)
            rollout = Rollout(
                "", str(question), sample, prompt, response, logprobs, "eos", "", 0
            )  # fmt: skip
            scored.append(ScoredRollout(rollout, Judgement(), chosen.random()))
    return scored


def report(found: dict[str, Any], outside: float, dtype: str) -> None:
    """Prints the table."""
    seconds = {name: statistics.median(turns) for name, turns in found["seconds"].items()}
    has = torch.cpu.get_capabilities()
    units = ", ".join(unit for unit in UNITS if has.get(unit)) or "none of " + ", ".join(UNITS)
    print(f"{has.get('cpu_name', 'processor')} with {units}; {dtype}")
    print(f"attention by '{found['attention']}'; medians of {len(found['seconds']['update'])}\n")
    print("| phase | seconds | over the bare pass |\n|---|---|---|")
    for name in (*PHASES, "update", "bare"):
        print(f"| {name} | {seconds[name]:.2f} | {seconds[name] / seconds['bare']:.2f} |")
    print(f"| waiting and serialisation | {outside:.2f} | {outside / seconds['bare']:.2f} |")
    ratio = (seconds["update"] + outside) / seconds["bare"]
    print(f"\nupdate over bare pass: {ratio:.2f} (goal: at most {GOAL})")
    for name, peak in found["peaks"].items():
        print(f"peak memory, {name}: {peak:.2f} GiB")


def measure(settings: Config, scored: list[ScoredRollout], repeats: int) -> None:
    """Runs the actor and prints what it measured."""
    packed = [Packed.of(scored)]
    plan = refine_plan(settings, settings.policy.source, 1000)
    with ray_cluster(settings.actors), LearnerGroup(settings, plan) as group:
        group.wait_ready()
        found = group.call(profile, packed, repeats)[0]
        outside = []
        for _ in range(repeats):
            began = time.perf_counter()
            group.call(_nothing, packed)
            outside.append(time.perf_counter() - began)
    dtype = str(resolve_dtype(settings.policy.dtype)).removeprefix("torch.")
    report(found, statistics.median(outside), dtype)


def _nothing(_: LearnerActor, packed: list[Packed[list[ScoredRollout]]]) -> int:
    """A call with a step's arguments that only reads them."""
    return sum(len(one.open()) for one in packed)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="The phases of a step in the learner.")
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2's, the first ones")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    parser.add_argument("--attention", choices=("auto", *get_args(Kernel)), default="auto")
    parser.add_argument("--compile", action="store_true", help="learner.compile")
    parser.add_argument("--budget", type=int, default=2048, help="tokens in a micro-batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = "random:llama"
        if options.model == "smollm2":
            whole = options.layers >= 30
            source = SMOLLM2 if whole else first_layers(options.layers, Path(folder) / "model")
        vocabulary = load_model(source, "float32")[0].config.vocab_size
        scored = rollouts(options.questions, vocabulary)
        learner = {
            "zero_stage": 0,
            "attention": options.attention,
            "compile": options.compile,
            "tokens_per_micro_batch": options.budget,
        }
        measure(config(source, options.dtype, learner, options.threads), scored, options.repeats)


if __name__ == "__main__":
    main()
