"""What the evaluation during refinement asks the frozen LM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.actors.units import Packed, PromptUnit
from lmcot.config import parse_config
from lmcot.data.prompts import load_templates
from lmcot.data.tasks import EXTRACTIVE_QA
from lmcot.records import Example, Paragraph, Rollout
from lmcot.training.interim import InterimEvaluation

EXAMPLE = Example("q", "Where is it?", "Velm", (Paragraph("It", ("It is in Velm.",)),))
RATIONALE = "It lies in Velm, so: Velm."


class Client:
    """Keeps the units that it is given."""

    def __init__(self) -> None:
        self.units: list[PromptUnit] = []

    def submit(self, key: str, unit: PromptUnit) -> None:
        self.units.append(unit)


@pytest.mark.parametrize(("reads", "passages"), [("passages", True), ("rationale_only", False)])
def test_it_asks_as_the_rewards_do(reads: str, passages: bool) -> None:
    """So the best policy is chosen by what refinement optimises."""
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "refine": {"start_from": "base"},
            "prompts": {"frozen_reads": reads},
            "evaluate": {"during": {"every": 1, "keep_best": False}},
        }
    )
    client, sampled = Client(), []
    run: Any = SimpleNamespace(
        task=EXTRACTIVE_QA,
        config=config,
        monitor=SimpleNamespace(truncate=lambda *_: None),
        validation=[SimpleNamespace(example=EXAMPLE)],
        templates=load_templates("default"),
        frozen_client=lambda _: client,
    )
    fleets: Any = SimpleNamespace(
        frozen=object(),
        rollout=SimpleNamespace(submit=lambda _, key, *rest, **__: sampled.append(key)),
    )
    learners: Any = None
    evaluation = InterimEvaluation(run, fleets, learners, after=0)
    evaluation.start(0, ())
    [key] = sampled
    rollout = Rollout("u", "q", 0, (1,), (2,), (-0.5,), "eos", RATIONALE, 0)
    evaluation._sampled(key, Packed.of([rollout]))
    [unit] = client.units
    [prompt] = unit.prompts
    assert RATIONALE in prompt[-1].content
    assert ("It is in Velm." in prompt[-1].content) is passages
