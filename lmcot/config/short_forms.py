"""Short forms: a string where a section is expected, such as ``policy: random:llama``.

Settings files, overrides and programs may use them. The settings of a run hold the whole sections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from lmcot.config.frozen import FrozenSettings

_SOURCES: Final = ("transformers", "vllm")
"""Backends of the frozen LM that take a model source."""


def is_address(text: str) -> bool:
    """Whether a short form of the frozen LM names an endpoint, and not a model source."""
    return text.startswith(("http://", "https://"))


def _data(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """One file for both: a share of its questions is held out of training, to evaluate on."""
    parts = {part: {"kind": "file", "path": text, "part": part} for part in ("train", "validation")}
    return {**given, **parts}


def _file(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "file", "path": text}


def _policy(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {**given, "source": text}


def _frozen(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if not is_address(text):
        if given.get("backend") in _SOURCES:
            return {**given, "source": text}
        return {**_of_any_backend(given), "backend": "transformers", "source": text}
    address, _, model = text.partition("#")
    if not model:
        raise ValueError(
            "frozen is an address without a model: add the model's name after a '#', as in "
            "http://127.0.0.1:8000/v1#my-model"
        )
    # Another endpoint must not be sent the headers and the key that were meant for this one.
    return {**_of_any_backend(given), "backend": "openai", "base_url": address, "model": model}


def _of_any_backend(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in FrozenSettings.model_fields}


SHORT_FORMS: Final[Mapping[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]]] = {
    "data": _data,
    "data.train": _file,
    "data.validation": _file,
    "policy": _policy,
    "frozen": _frozen,
}
"""For each key, what makes a section of a string and of the section that it replaces."""


def in_full(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a section in place of each short form.

    Raises:
        ValueError: if a short form lacks something.
    """
    full = dict(values)
    for key in SHORT_FORMS:
        full = _at(full, key.split("."), key)
    return full


def _at(values: Mapping[str, Any], parts: list[str], key: str) -> dict[str, Any]:
    part, rest = parts[0], parts[1:]
    inner = values.get(part)
    if not rest and isinstance(inner, str):
        return {**values, part: SHORT_FORMS[key](inner, {})}
    if rest and isinstance(inner, Mapping):
        return {**values, part: _at(inner, rest, key)}
    return dict(values)
