"""The parts of `benchmarks.gpu_check`: each one measures something, in a process of its own."""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.learner_step import config as learner_config
from benchmarks.learner_step import rollouts
from benchmarks.timing import own_peak
from benchmarks.trl_grpo import compare
from lmcot.config import Config, VllmSettings, parse_config
from lmcot.learner.plan import distill_plan, refine_plan
from lmcot.learner.session import LearnerSession
from lmcot.models.attention import KERNELS, use_kernel
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import Generated, SampleRequest
from lmcot.models.generation.shared import SharedEngine
from lmcot.models.policy import disable_dropout, response_logits
from lmcot.models.sequences import Row, make_batch
from lmcot.models.sources import load_config, load_model
from lmcot.records import Failure

SAMPLES, TOKENS = 4, 64
BUDGET = 8192
"""Tokens in a micro-batch."""
MOST_UPDATE_S = 1.0
CLOSE = {"float32": 1e-3, "bfloat16": 0.3}
"""By how much two arithmetics may differ in the log-probability of a token."""


@dataclass(frozen=True)
class Result:
    """What a part measured."""

    told: str
    peak_gib: float
    figure: float = 0.0
    """What the same part of another kind must agree with."""
    trouble: str = ""
    """What is wrong with it; empty if nothing is."""


Part = Callable[[argparse.Namespace], Result]


def _peak() -> float:
    """Most memory held at once: of the GPU where there is one, else resident."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else own_peak()


def _seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def learner_at(stage: int) -> Part:
    """GRPO steps of the learner at a ZeRO stage, from made-up rationales."""

    def part(options: argparse.Namespace) -> Result:
        learner = {"zero_stage": stage, "attention": "model", "tokens_per_micro_batch": BUDGET}
        settings = learner_config(options.source, options.dtype, learner)
        scored = rollouts(options.questions, _vocabulary(options.source))
        session = LearnerSession(settings, refine_plan(settings, options.source, 1000))
        first = session.ppo.step(scored, 0)
        second: dict[str, float] = {}
        seconds = _seconds(lambda: second.update(session.ppo.step(scored, 1)))
        norm, skipped = first["optimiser/grad_norm"], second["optimiser/skipped_updates"]
        fine = math.isfinite(norm) and norm > 0 and not skipped
        tokens = sum(len(one.rollout.response_ids) for one in scored) / seconds
        return Result(
            f"{seconds:.2f} s a step, {tokens:.0f} response tokens/s, gradient norm {norm:.4g}",
            _peak(), norm, "" if fine else f"norm {norm}, {skipped:.0f} updates skipped",
        )  # fmt: skip

    return part


def attention(options: argparse.Namespace) -> Result:
    """Each kernel of the learner on prompts that responses share, against each response alone."""
    lm = _evaluated(options)
    rows = _made_up_rows(options)
    with torch.no_grad():
        use_kernel(lm, "model")
        alone = [Row(row.prompt, [response]) for row in rows for response in row.responses]
        wanted = torch.cat([_logprobs(lm, [row]) for row in alone])
        differences, seconds = {}, {}
        for kernel in KERNELS:
            use_kernel(lm, kernel)
            _logprobs(lm, rows)  # the first pass prepares kernels
            seconds[kernel] = _seconds(lambda: _logprobs(lm, rows))
            differences[kernel] = float((_logprobs(lm, rows) - wanted).abs().max())
    told = ", ".join(
        f"{kernel}: {difference:.2g} at most in {seconds[kernel] * 1000:.0f} ms"
        for kernel, difference in differences.items()
    )
    worst = max(differences.values())
    return Result(told, _peak(), worst, _too_far(worst, lm))


def own_engine(options: argparse.Namespace) -> Result:
    """lmcot's own engine: its log-probabilities against a plain pass, and its speed."""
    lm = _evaluated(options)
    return _sampled(GenerationEngine(lm, pad_id=0), lm, options)


def vllm_engine(options: argparse.Namespace) -> Result:
    """The same of vLLM, before and after other weights were loaded in place."""
    from lmcot.models.generation.vllm_engine import VllmEngine

    settings = VllmSettings(cache_gib=options.cache_gib)
    engine = VllmEngine(options.source, options.dtype, settings)
    shared = SharedEngine(engine)
    lm = _evaluated(options)
    before = _sampled(shared, lm, options)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    engine.load(lm.named_parameters())  # the first time, it prepares itself
    seconds = _seconds(lambda: engine.load(lm.named_parameters()))
    after = _sampled(shared, lm, options)
    slow = f"an update took {seconds:.2f} s, over {MOST_UPDATE_S:g}"
    trouble = before.trouble or after.trouble or (slow if seconds > MOST_UPDATE_S else "")
    told = f"{before.told}; update in {seconds:.2f} s, then {after.told}"
    shared.close()
    engine.close()
    return Result(told, max(before.peak_gib, after.peak_gib), after.figure, trouble)


def grpo(options: argparse.Namespace) -> Result:
    """GRPO steps with rollouts by vLLM and a reward without a model, beside TRL's with vLLM."""
    with tempfile.TemporaryDirectory() as name:
        seconds, work = compare.time_lmcot(_refinement(options), Path(name) / "run")
        told = f"lmcot {options.questions * SAMPLES / seconds:.1f} samples/s"
        if not options.trl_python:
            return Result(f"{told}; TRL not run: no --trl-python", _peak())
        work["gpu"] = not options.cpu
        rows = options.questions * SAMPLES
        theirs = compare.time_trl(options.trl_python, work, rows, Path(name))
    return Result(
        f"{told}, TRL {options.questions * SAMPLES / theirs:.1f} samples/s: "
        f"{theirs / seconds:.2f} times as fast", _peak(), theirs / seconds,
    )  # fmt: skip


def grpo_guided(options: argparse.Namespace) -> Result:
    """GRPO steps with both models on vLLM, judged by the frozen LM."""
    frozen = {
        "backend": "vllm", "source": options.source, "dtype": options.dtype,
        "cache_gib": options.cache_gib, "cache": {"enabled": False},
    }  # fmt: skip
    changed = {"frozen": frozen, "rewards": {"kind": "guidance"}}
    with tempfile.TemporaryDirectory() as name:
        seconds, _ = compare.time_lmcot(_refinement(options, changed), Path(name) / "run")
    speed = options.questions * SAMPLES / seconds
    return Result(f"{speed:.1f} samples/s, {seconds:.2f} s a step", _peak(), speed)


def distillation(options: argparse.Namespace) -> Result:
    """Steps of distillation: prompts and rationales of the sample, all of their tokens counted."""
    settings = _learner_of(options)
    scored = rollouts(options.questions, _vocabulary(options.source))
    pairs = [(one.rollout.prompt_ids, one.rollout.response_ids) for one in scored]
    session = LearnerSession(settings, distill_plan(settings, options.source, 1000))
    session.distiller.step(pairs)
    seconds = statistics.median(_seconds(lambda: session.distiller.step(pairs)) for _ in range(3))
    tokens = sum(len(prompt) + len(response) for prompt, response in pairs)
    return Result(f"{tokens / seconds:.0f} tokens/s", _peak(), tokens / seconds)


def _learner_of(options: argparse.Namespace) -> Config:
    learner = {"zero_stage": 0, "tokens_per_micro_batch": BUDGET}
    return learner_config(options.source, options.dtype, learner)


def _refinement(options: argparse.Namespace, changed: dict[str, Any] | None = None) -> Config:
    """The comparison's settings with vLLM; on a GPU that all actors share."""
    values = compare.config(options.dtype, options.questions, options.steps + 1, 8192).model_dump()
    values["policy"]["source"] = options.source
    values["rollout"] = {"engine": "vllm", "cache_gib": options.cache_gib}
    values["actors"]["prompts_per_unit"] = max(1, options.questions // 4)
    if not options.cpu:
        for role in ("rollout", "frozen", "learner"):
            values["actors"][role]["gpus"] = 0.3
    return parse_config({**values, **(changed or {})})


def _vocabulary(source: str) -> int:
    return int(load_config(source).get_text_config(decoder=True).vocab_size)


def _evaluated(options: argparse.Namespace) -> Any:
    lm, _ = load_model(options.source, options.dtype)
    disable_dropout(lm)
    return lm.eval()


def _made_up_rows(options: argparse.Namespace) -> list[Row]:
    chosen, vocabulary = random.Random(0), _vocabulary(options.source)

    def ids(length: int) -> list[int]:
        return [chosen.randrange(3, vocabulary) for _ in range(length)]

    return [
        Row(ids(chosen.randint(40, 200)), [ids(TOKENS // 2) for _ in range(SAMPLES)])
        for _ in range(options.questions)
    ]


def _logprobs(lm: Any, rows: Sequence[Row]) -> Tensor:
    """Log-probabilities of all responses' tokens, in order."""
    batch = make_batch(rows, pad_id=0, start_id=None)
    logits, _ = response_logits(lm, batch)
    targets = batch.targets.to(logits.device).unsqueeze(1)
    return logits.float().log_softmax(-1).gather(1, targets).squeeze(1).cpu()


def _sampled(
    engine: GenerationEngine | SharedEngine, lm: Any, options: argparse.Namespace
) -> Result:
    """Samples, and compares the log-probabilities with those of the learner's pass."""
    requests = [SampleRequest(row.prompt, range(SAMPLES), TOKENS) for row in _made_up_rows(options)]
    engine.sample(requests)  # the first pass prepares kernels
    began = time.perf_counter()
    found = engine.sample(requests)
    seconds = time.perf_counter() - began
    worst, sampled = 0.0, 0
    with torch.no_grad():
        for request, samples in zip(requests, found, strict=True):
            if isinstance(samples, Failure):
                raise RuntimeError(samples.reason)
            worst = max(worst, *(_difference(lm, request, one) for one in samples))
            sampled += sum(len(one.response_ids) for one in samples)
    told = f"{sampled / seconds:.0f} tokens/s, log-probabilities {worst:.2g} apart at most"
    return Result(told, _peak(), worst, _too_far(worst, lm))


def _difference(lm: Any, request: SampleRequest, one: Generated) -> float:
    wanted = _logprobs(lm, [Row(request.prompt_ids, [one.response_ids])])
    return float((torch.tensor(one.logprobs) - wanted).abs().max())


def _too_far(worst: float, lm: Any) -> str:
    most = CLOSE[str(lm.dtype).removeprefix("torch.")]
    return "" if worst <= most else f"log-probabilities differ by {worst:.2g}, over {most:g}"
