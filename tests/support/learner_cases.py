"""What the tests of the learner share: questions, settings, sessions and their parameters."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lmcot.config import Config, parse_config
from lmcot.data.sampler import sample_seed
from lmcot.learner import engine
from lmcot.learner.batching import TokenPair
from lmcot.learner.plan import distill_plan, refine_plan
from lmcot.learner.session import LearnerSession
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import SampleRequest
from lmcot.models.sources import load_model
from lmcot.records import Failure, Judgement, Rollout, ScoredRollout

KINDS = ("counting-llama", "counting-t5")
BOTH = pytest.mark.parametrize("kind", KINDS)
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])

QUESTIONS = ((2, (3, 7)), (5, (1, 6, 5)), (9, (4, 2)))
"""Length of each prompt, and of the responses to it."""
TOKENS = 28
"""Of all those responses."""

STATELESS = {"learning_rate": 0.5, "betas": [0.0, 0.0], "eps": 1.0, "max_grad_norm": 1e6}
"""With betas of 0 a step is p -= lr * g / (|g| + eps), for which a test can account."""

LORA = {"rank": 4, "alpha": 8}


class Layout(NamedTuple):
    """Settings on which no result may depend."""

    stage: int
    budget: int
    share: bool


LAYOUTS = (
    Layout(0, 1, False),  # one response at a time
    Layout(0, 24, True),
    Layout(1, 2048, True),
    Layout(2, 24, False),
    Layout(3, 40, True),
)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def make_config(
    kind: str,
    optimiser: dict[str, Any] | None = None,
    layout: Layout | None = None,
    **changes: Any,
) -> Config:
    """``changes``: keys of ``refine``, or of ``learner`` and ``policy`` with a prefix."""
    sections: dict[str, dict[str, Any]] = {
        "policy": {"source": f"random:{kind}", "dtype": "float32"},
        "learner": {},
        "distill": {},
        "refine": {"start_from": "base"},
    }
    if layout is not None:
        sections["learner"] = {
            "zero_stage": layout.stage,
            "tokens_per_micro_batch": layout.budget,
            "share_prompts": layout.share,
        }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            sections[section][name] = value
        else:
            sections["refine"][key] = value
    if optimiser is not None:
        sections["refine"]["optimiser"] = sections["distill"]["optimiser"] = optimiser
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "rewards": {"kind": "increasing"},
            **sections,
        }
    )


def fixed_kl(coefficient: float, apply_to: str = "reward") -> dict[str, Any]:
    return {"kind": "fixed", "coefficient": coefficient, "apply_to": apply_to}


def open_session(
    config: Config, stage: Literal["distill", "refine"] = "refine", steps: int = 10
) -> LearnerSession:
    """A session whose parameters are all partitioned at stage 3, as those of large models are."""
    with set_up_for_tests():
        plan = refine_plan if stage == "refine" else distill_plan
        return LearnerSession(config, plan(config, config.policy.source, steps))


@contextmanager
def set_up_for_tests() -> Iterator[None]:
    """At stage 3 small parameters are left whole: here not one is.

    And DeepSpeed's six reports of the memory in use, in bfloat16 at stage 1, take two seconds.
    """
    with (
        mock.patch.object(engine, "_WHOLE_BELOW", 0),
        mock.patch("deepspeed.runtime.bf16_optimizer.see_memory_usage"),
    ):
        yield


# ---------------------------------------------------------------- what is learnt from


def prompt(question: int, length: int) -> tuple[int, ...]:
    return tuple(3 + (question + position) % 10 for position in range(length))


@functools.cache
def _sampled(
    kind: str, seed: int, temperature: float, questions: tuple[tuple[int, tuple[int, ...]], ...]
) -> tuple[Rollout, ...]:
    """Responses of given lengths that the model as it comes samples."""
    return tuple(sample(load_model(f"random:{kind}", "float32")[0], seed, temperature, questions))


def sample(
    lm: Any,
    seed: int = 0,
    temperature: float = 1.0,
    questions: Sequence[tuple[int, Sequence[int]]] = QUESTIONS,
) -> list[Rollout]:
    """Responses of given lengths that ``lm`` samples."""
    found: list[Rollout] = []
    generation = GenerationEngine(lm, pad_id=0)
    for question, (prompt_length, lengths) in enumerate(questions):
        for number, length in enumerate(lengths):
            seed_of_sample = sample_seed(seed, len(found))
            request = SampleRequest(
                prompt(question, prompt_length), [seed_of_sample], length, temperature
            )
            samples = generation.sample([request])[0]
            assert not isinstance(samples, Failure)
            one = samples[0]
            found.append(
                Rollout(
                    unit_id=f"{seed}/{question}",
                    example_id=str(question),
                    sample=number,
                    prompt_ids=prompt(question, prompt_length),
                    response_ids=one.response_ids,
                    logprobs=one.logprobs,
                    finish_reason="eos",
                    text="",
                    policy_version=0,
                )
            )
    return found


def rollouts(
    kind: str,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    questions: Sequence[tuple[int, Sequence[int]]] = QUESTIONS,
    rewards: Sequence[float] | None = None,
    finish: Sequence[str] | None = None,
) -> list[ScoredRollout]:
    """What the model as it comes samples for the questions, with rewards."""
    shapes = tuple((length, tuple(lengths)) for length, lengths in questions)
    return score(_sampled(kind, seed, temperature, shapes), seed, rewards, finish)


def score(
    sampled: Sequence[Rollout],
    seed: int = 0,
    rewards: Sequence[float] | None = None,
    finish: Sequence[str] | None = None,
) -> list[ScoredRollout]:
    """Rewards as given, else drawn; what ended is as given, else all by EOS."""
    generator = random.Random(seed)
    drawn = rewards or [generator.uniform(-1, 1) for _ in sampled]
    reasons: Any = finish or ["eos"] * len(sampled)
    return [
        ScoredRollout(replace(one, finish_reason=reason), Judgement(), reward)
        for one, reward, reason in zip(sampled, drawn, reasons, strict=True)
    ]


def off_policy(scored: Sequence[ScoredRollout], seed: int = 5) -> list[ScoredRollout]:
    """As if another policy had sampled them: importance weights from 0.5 to beyond the cap."""
    generator = random.Random(seed)
    return [
        replace(
            one,
            rollout=replace(
                one.rollout,
                logprobs=tuple(p + generator.uniform(-1, 0.7) for p in one.rollout.logprobs),
            ),
        )
        for one in scored
    ]


def token_pairs(seed: int = 0) -> list[TokenPair]:
    """Prompts and rationales to distil, of the questions' lengths, each ending in EOS."""
    generator = random.Random(seed)
    return [
        (prompt(question, length), [*generator.choices(range(3, 13), k=response - 1), 1])
        for question, (length, responses) in enumerate(QUESTIONS)
        for response in responses
    ]


# ---------------------------------------------------------------- parameters


def parameters(session: LearnerSession) -> dict[str, Tensor]:
    """What trains, whole, at any stage."""
    return whole(session._engine, session.policy)


def whole(of: engine.TrainEngine, module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.whole_parameters(module)}


def masters(of: engine.TrainEngine) -> list[Tensor]:
    """What the optimiser itself updates, in float32 whatever the parameters are."""
    zero: Any = of.optimizer
    found = getattr(zero, "fp32_partitioned_groups_flat", None)  # at stage 3 the groups are empty
    groups = getattr(zero, "optimizer", zero).param_groups
    found = list(found or [p for group in groups for p in group["params"]])
    assert all(tensor.dtype == torch.float32 for tensor in found)
    return found


def optimiser_state(of: engine.TrainEngine) -> list[Tensor]:
    """The optimiser's parameters, its moments of them and its counts of steps."""
    zero: Any = of.optimizer
    state = getattr(zero, "optimizer", zero).state
    moments = [state[tensor][name] for tensor in masters(of) for name in _ADAM]
    return [tensor.detach().clone() for tensor in [*masters(of), *moments]]


_ADAM = ("step", "exp_avg", "exp_avg_sq")


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that differ at all."""
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def disturb(model: Any, size: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
