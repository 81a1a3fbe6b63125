"""What all settings share: strictness and the common value types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["auto", "float32", "bfloat16"]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _named_keys_leave_the_other_defaults(cls, values: Any) -> Any:
        """Where only some keys of a section are given, the others keep that section's defaults."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for name, info in cls.model_fields.items():
            if name in values:
                default = info.get_default(call_default_factory=True, validated_data={})
                filled[name] = _with_defaults(values[name], default, info.discriminator)
        return filled


def _with_defaults(given: Any, default: Any, discriminator: Any) -> Any:
    """A section's keys with those of its default that are not given.

    Another variant than the default's gets none of them, and what is not a plain mapping stays as
    it is: an empty mapping by name is empty, and a `Settings` object is complete.
    """
    if not isinstance(given, Mapping):
        return given
    if isinstance(default, Settings):
        kind = getattr(default, discriminator) if discriminator else None
        if kind is not None and given.get(discriminator, kind) != kind:
            return given
        fields = type(default).model_fields
        kept = {
            name: value
            for name, value in default
            if name == discriminator or fields[name].is_required() or value != fields[name].default
        }
        inner = {name: info.discriminator for name, info in fields.items()}
    elif isinstance(default, dict) and any(isinstance(one, Mapping) for one in given.values()):
        kept, inner = default, {}
    else:
        return given
    named = {key: _with_defaults(one, kept.get(key), inner.get(key)) for key, one in given.items()}
    return {**kept, **named}
