"""What all settings share: strictness and the common value types."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["auto", "float32", "bfloat16"]
Row = Literal[
    "standard",
    "standard+sc",
    "cot",
    "cot+sc",
    "guided_base",
    "guided_base+sc",
    "guided_distilled",
    "guided_distilled+sc",
    "guided_refined",
    "guided_refined+sc",
    "small_alone",
    "control_empty",
    "control_shuffled",
    "control_masked",
    "control_oracle",
]
Aspect = Literal[
    "factuality",
    "relevance",
    "logicality",
    "consistency",
    "coherence",
    "fluency",
    "naturalness",
    "readability",
]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
