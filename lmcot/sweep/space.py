"""Settings of a sweep: its space, how trials are drawn, and when they are stopped early."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from lmcot.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Settings
from lmcot.config.load import differences, load_config, parse_settings, read_yaml_mapping
from lmcot.config.root import Config
from lmcot.errors import UserError

_SAME_IN_ALL = (
    "actors.address",
    "checkpoints",
    "data.max_validation",
    "data.validation",
    "distill",
    "evaluate",
    "monitor",
    "policy.source",
    "refine.start_from",
    "refine.steps",
    "reject",
    "teacher",
)
"""These keys cannot vary: trials start from one policy and are compared step by step; the others do
not concern refine."""
_FORMS = ("choice", "uniform", "loguniform", "randint", "grid")
_LONGEST_NAME = 80
_DIGITS = 4
"""Significant digits of drawn numbers, which people read, type and find as folders."""


class Choice(Settings):
    """One of several values, each as likely."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)]

    def draw(self, rng: random.Random) -> Any:
        """One of the values."""
        return rng.choice(self.choice)


class Grid(Settings):
    """Every one of several values, with every combination of the other grids."""

    grid: Annotated[tuple[Any, ...], Field(min_length=1)]


class Uniform(Settings):
    """A number between two, each as likely."""

    uniform: tuple[float, float]

    @field_validator("uniform")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        return _ordered(bounds)

    def draw(self, rng: random.Random) -> float:
        """Draws a number of few digits."""
        return _short(rng.uniform(*self.uniform), self.uniform)


class LogUniform(Settings):
    """A positive number between two, each order of magnitude as likely."""

    loguniform: tuple[PositiveFloat, PositiveFloat]

    @field_validator("loguniform")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        return _ordered(bounds)

    def draw(self, rng: random.Random) -> float:
        """A number of few digits."""
        low, high = map(math.log, self.loguniform)
        return _short(math.exp(rng.uniform(low, high)), self.loguniform)


class RandInt(Settings):
    """A whole number from one to another, both included, each as likely."""

    randint: tuple[int, int]

    @field_validator("randint")
    @classmethod
    def _ordered(cls, bounds: tuple[int, int]) -> tuple[int, int]:
        _ordered(bounds)
        return bounds

    def draw(self, rng: random.Random) -> int:
        """A whole number."""
        return rng.randint(*self.randint)


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if not (all(map(math.isfinite, bounds)) and bounds[0] < bounds[1]):
        raise ValueError(f"the bounds are {list(bounds)}: give two numbers, the lower one first")
    return bounds


def _short(value: float, bounds: tuple[float, float]) -> float:
    return min(max(float(f"{value:.{_DIGITS}g}"), bounds[0]), bounds[1])


def _form(value: Any) -> str | None:
    """The tag of a dimension: in brackets, it is none of the keys that an error names."""
    if isinstance(value, Settings):
        return f"[{next(iter(type(value).model_fields))}]"
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _FORMS:
        return f"[{next(iter(value))}]"
    return None


Dimension = Annotated[
    Annotated[Choice, Tag("[choice]")]
    | Annotated[Uniform, Tag("[uniform]")]
    | Annotated[LogUniform, Tag("[loguniform]")]
    | Annotated[RandInt, Tag("[randint]")]
    | Annotated[Grid, Tag("[grid]")],
    Discriminator(
        _form,
        custom_error_type="form_of_dimension",
        custom_error_message="it should be one of {choice: [...]}, {uniform: [low, high]}, "
        "{loguniform: [low, high]}, {randint: [low, high]}, {grid: [...]}",
    ),
]


class AshaSettings(Settings):
    """Asynchronous successive halving (Li et al. 2020): trials that lag are stopped early."""

    grace_steps: PositiveInt = 10
    """Steps that every trial may do; then, and at each of the next rungs, the worse ones end."""
    reduction_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0
    """One in this many trials continues beyond a rung; each rung has this many times the steps of
    the one before."""
    brackets: PositiveInt = 1
    """Number of brackets that trials are dealt to; each bracket's first rung is one rung later than
    the one before's."""


class SweepSettings(Settings):
    """The search space and the search."""

    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """The values of each varied setting, by its dotted key."""
    metric: str = "reward/mean"
    """A metric of refine's steps, as in metrics.jsonl."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller values are better."""
    average_over: PositiveInt = 5
    """Trials are compared by the metric's mean over this many last steps: single ones are noisy."""
    trials: PositiveInt = 1
    """Number of draws; for each, every combination of the grids is tried."""
    concurrent: PositiveInt = 1
    """Largest number of trials at once; there are fewer if the cluster lacks room."""
    seed: NonNegativeInt = 0
    """Seed of the draws; each trial's own seed is the configuration's."""
    driver_cpus: PositiveFloat = 0.1
    """Ray CPUs reserved for the process that drives a trial: it mostly waits for its actors."""
    asha: AshaSettings = AshaSettings()
    """When trials are stopped early."""

    @model_validator(mode="after")
    def _draws_differ(self) -> SweepSettings:
        if self.trials > 1 and all(isinstance(one, Grid) for one in self.space.values()):
            raise ValueError(
                f"trials is {self.trials}, but the space has nothing to draw, only grids, which "
                "are tried whole each time: set trials to 1"
            )
        return self

    def draw(self) -> list[dict[str, Any]]:
        """The values of each trial; with more ``trials``, the first ones stay what they are."""
        rng = random.Random(self.seed)
        grids = {key: one.grid for key, one in self.space.items() if isinstance(one, Grid)}
        return [
            {
                key: combination[key] if isinstance(one, Grid) else one.draw(rng)
                for key, one in self.space.items()
            }
            for _ in range(self.trials)
            for combination in (
                dict(zip(grids, values, strict=True))
                for values in itertools.product(*grids.values())
            )
        ]


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the search space."""

    number: int
    values: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """Number and values, which name its folder and its row of the table."""
        values = ",".join(f"{key.rpartition('.')[2]}={v}" for key, v in self.values.items())
        plain = re.sub(r"[^\w=,.+-]+", "_", values)
        return f"{self.number:04d}-{plain}"[:_LONGEST_NAME]


def load_sweep(path: str | Path) -> SweepSettings:
    """The settings of a sweep from a YAML file.

    Raises:
        UserError: naming the key that is wrong, and what would be right.
    """
    try:
        return parse_settings(SweepSettings, read_yaml_mapping(path))
    except UserError as error:
        raise UserError(f"in '{path}': {error}") from None


def plan_trials(config: str | Path, overrides: list[str], sweep: SweepSettings) -> list[Trial]:
    """Makes all trials and checks their settings, and each value that could still be drawn.

    Raises:
        UserError: naming the key and the value that are wrong.
    """
    base = load_config(config, overrides)
    if sweep.asha.grace_steps > base.refine.steps:
        raise UserError(
            f"asha.grace_steps is {sweep.asha.grace_steps}, but a trial has only "
            f"{base.refine.steps} steps (refine.steps): lower the one or raise the other"
        )

    def checked(values: dict[str, Any]) -> Config:
        return _with_values(config, overrides, values, base)

    drawn = sweep.draw()
    for key, dimension in sweep.space.items():
        for value in getattr(dimension, "choice", getattr(dimension, "grid", ())):
            checked({**drawn[0], key: value})
    return [Trial(number, values, checked(values)) for number, values in enumerate(drawn, 1)]


def _with_values(
    path: str | Path, overrides: list[str], values: dict[str, Any], base: Config
) -> Config:
    shown = {key: _as_yaml(value) for key, value in values.items()}
    assigned = [f"{key}={value}" for key, value in shown.items()]
    try:
        config = load_config(path, [*overrides, *assigned])
    except UserError as error:
        raise UserError(f"the search space gives {', '.join(assigned)}, but {error}") from None
    for key in differences(base, config):
        if any(key == same or key.startswith(same + ".") for same in _SAME_IN_ALL):
            raise UserError(
                f"the search space varies '{key}', which must be the same in all trials: take "
                "it out of 'space'"
            )
    return config


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()
