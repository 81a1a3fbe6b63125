"""Settings of what a run is expected to take, and of what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from lmcot.config.base import NonNegativeFloat, Settings

EstimatedStage = Literal["annotate", "distill", "reject", "refine", "evaluate"]
PricedRole = Literal["learner", "rollout", "reward", "frozen"]


class StageRate(Settings):
    """What one unit of a stage takes: a rationale of `annotate`, `reject` or `refine`, a training
    question and epoch of `distill`, a question and row of `evaluate`."""

    seconds: NonNegativeFloat
    """Seconds of the stage for each unit, with the actors of these settings."""
    frozen_tokens: NonNegativeFloat = 0.0
    """Tokens that the frozen LM reads and writes for it."""


class EstimateSettings(Settings):
    """What `lmcot plan` foretells from, and what the report then compares with."""

    like: str | None = None
    """Run directory or URL of an earlier run, in which units of each stage were measured."""
    rates: Mapping[EstimatedStage, StageRate] = Field(default_factory=dict)
    """Rates of stages, in place of what that run measured."""
    currency: str = "USD"
    """Name of the currency of all prices."""
    per_hour: Mapping[PricedRole, NonNegativeFloat] = Field(default_factory=dict)
    """Price of one actor of a role for an hour, while a stage that needs it runs: its share of the
    price of its node. Roles without a price cost nothing."""
    per_million_tokens: NonNegativeFloat = 0.0
    """Price of a million tokens, read or written, of the frozen LM behind an endpoint."""
