"""The product as it is after somebody followed docs/extending.md to another estimator or loss."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
from pydantic import create_model

from lmcot.config import Config, Gae, PpoLoss, RefineSettings, parse_settings, training


def add_to(module: ModuleType, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs code as if it stood at the end of a module, until the test is over."""
    names = dict(vars(module))
    exec(compile(code, f"docs/extending.md, {module.__name__}", "exec"), names)
    for name, value in names.items():
        if vars(module).get(name) is not value:
            monkeypatch.setattr(module, name, value, raising=False)


def parse_extended(config: Config, changes: Mapping[str, Any]) -> Config:
    """Settings with other keys of ``refine``, whose variants are those that the module now has."""
    refine = create_model(
        "ExtendedRefine",
        __base__=RefineSettings,
        advantage=(training.Advantage, Gae()),
        loss=(training.PolicyLoss, PpoLoss()),
    )
    extended = create_model("ExtendedConfig", __base__=Config, refine=(refine, refine()))
    values = config.model_dump()
    return parse_settings(extended, {**values, "refine": {**values["refine"], **changes}})
