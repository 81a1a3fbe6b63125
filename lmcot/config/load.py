"""Settings are read from YAML files and ``key.sub=value`` overrides; errors are one sentence."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lmcot.config.addresses import MAY_HOLD_SECRETS
from lmcot.config.data import FileData
from lmcot.config.prompts import DrawnDemonstrations
from lmcot.config.renamed import renamed_keys
from lmcot.config.root import Config
from lmcot.config.short_forms import SHORT_FORMS
from lmcot.config.yaml_text import parse_yaml
from lmcot.errors import UserError
from lmcot.storage import is_url, local_path, matching, place, reaching

if TYPE_CHECKING:
    from lmcot.storage import Place

_Kind = TypeVar("_Kind", bound=BaseModel)

_NOT_A_MAPPING = ("model_type", "model_attributes_type", "dict_type")
"""Types of pydantic's errors."""
_NOT_PLAIN = ("int_type", "literal_error")
_NOT_KEYS = ("[", "tagged-union[", "constrained-", "literal[", "tuple[")
"""Prefixes of pydantic's names for the arms of a union and for dictionary keys."""


def load_config(path: str | Place, overrides: list[str] | None = None) -> Config:
    """Settings from a YAML file, with overrides of the form ``key.sub=value`` on top.

    Raises:
        UserError: naming the key that is wrong, and what would be right.
    """
    config = read_config(path, overrides)
    check_files(config)
    return config


def read_config(path: str | Place, overrides: list[str] | None = None) -> Config:
    """As `load_config`, for whom the files that the settings name need not be there."""
    return parse_config(_given(path, overrides))


def renamed_settings(path: str | Place, overrides: list[str] | None = None) -> list[str]:
    """A sentence for each key that the file or an override still calls by its old name.

    Raises:
        UserError: as `load_config` does of a file or an override that cannot be read.
    """
    return renamed_keys(_given(path, overrides))


def _given(path: str | Place, overrides: list[str] | None) -> dict[str, Any]:
    values = read_yaml_mapping(path)
    for override in overrides or []:
        _set(values, *_parsed(override), override)
    return values


def parse_config(values: dict[str, Any]) -> Config:
    """Settings of a run from plain values. Raises as `parse_settings` does."""
    return parse_settings(Config, values)


def parse_settings(kind: type[_Kind], values: dict[str, Any]) -> _Kind:
    """Settings of some kind from plain values.

    Raises:
        UserError: one sentence about the first key that is wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error, kind)) from None


def read_yaml_mapping(path: str | Place, *, as_text: bool = False) -> dict[str, Any]:
    """The mapping that a YAML file holds; ``as_text`` keeps plain values as they are written.

    Raises:
        UserError: if the file cannot be read, is not YAML, or holds something else.
    """
    try:
        where = place(path)
        with reaching(where):
            text = where.read_text(encoding="utf-8")
        values = parse_yaml(text, as_text=as_text)
    except FileNotFoundError:
        raise UserError(f"the file '{path}' does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the file '{path}' cannot be read ({error})") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"the file '{path}' is not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"the file '{path}' must hold a mapping of keys to values")
    return values


def dump_config(config: Config) -> str:
    """The resolved settings as YAML, every default included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def check_files(config: Config) -> None:
    """Checks that the files named by the settings exist; those at URLs are checked when opened.

    Raises:
        UserError: naming the key and the file.
    """
    sources: dict[str, Any] = {
        "data.train": config.data.train,
        "data.validation": config.data.validation,
    }
    wanted = config.prompts.demonstrations
    if isinstance(wanted, DrawnDemonstrations):
        sources["prompts.demonstrations.source"] = wanted.source
    for key, source in sources.items():
        if isinstance(source, FileData) and not is_url(source.path) and not matching(source.path):
            raise UserError(
                f"{key}.path names '{source.path}', which is not a file, a folder, or a "
                "pattern that matches one: check the path"
            )
    templates = config.prompts.templates
    local = templates.endswith((".yaml", ".yml")) and not is_url(templates)
    if local and not local_path(templates).is_file():
        raise UserError(f"prompts.templates names '{templates}', which is not a file")


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Keys (dotted, sorted) whose values differ between two configs, with both values.

    A source ``auto`` does not differ from the source that it stands for.
    """
    before, after = flat_settings(old), flat_settings(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def flat_settings(config: Config) -> dict[str, Any]:
    """All settings, as `Config.resolved` has them, as plain values by their dotted keys."""
    return _flatten(config.resolved().model_dump(mode="json"))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def overridden(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain settings with other values at dotted keys.

    Raises:
        UserError: if a key goes below a plain value.
    """
    changed = copy.deepcopy(dict(values))
    for key, value in changes.items():
        _set(changed, key, value, key)
    return changed


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The values of overrides of the form ``key.sub=value`` by their dotted keys.

    Raises:
        UserError: if one has another form, or its value is not valid YAML.
    """
    return dict(_parsed(one) for one in overrides)


def _parsed(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise UserError(f"the override '{override}' is not of the form key.sub=value")
    try:
        return key, parse_yaml(text)
    except yaml.YAMLError:
        shown = f"{key}=..." if set(parts) & set(MAY_HOLD_SECRETS) else override
        raise UserError(f"the override '{shown}' does not hold a valid YAML value") from None


def _set(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    parts = key.split(".")
    node = values
    for depth, part in enumerate(parts[:-1], 1):
        child = _section(node.setdefault(part, {}), ".".join(parts[:depth]))
        if not isinstance(child, dict):
            raise UserError(
                f"the override '{override}' goes below '{part}', which is a plain value"
            )
        node[part] = child
        node = child
    if key in SHORT_FORMS and isinstance(value, str):
        value = _section(value, key, over=_section(node.get(parts[-1]), key))
    node[parts[-1]] = value


def _section(value: Any, key: str, over: Any = None) -> Any:
    """A section where there is none yet, or where a short form stands; else the value itself.

    Args:
        over: the section that a short form replaces.
    """
    if value is None:
        return {}
    if key not in SHORT_FORMS or not isinstance(value, str):
        return value
    try:
        return SHORT_FORMS[key](value, over if isinstance(over, dict) else {})
    except ValueError as error:
        raise UserError(str(error)) from None


def _sentence(error: ValidationError, root: type[BaseModel]) -> str:
    # An unknown key explains more than the errors that follow from it; and a section that is wrong
    # explains more than that it is no number, where either may stand.
    problems = sorted(
        error.errors(),
        key=lambda one: (
            one["type"] != "extra_forbidden",
            one["type"] in _NOT_PLAIN and isinstance(one["input"], Mapping),
        ),
    )
    problem = problems[0]
    kind, context = problem["type"], problem.get("ctx", {})
    path, model = _locate(problem["loc"], root)
    key = ".".join(path)
    if kind == "extra_forbidden":
        return _unknown_key(path, sorted(model.model_fields) if model else [])
    if "[key]" in problem["loc"] and "expected" in context:
        return _unknown_key(path, re.findall(r"'(\w+)'", context["expected"]))
    if kind == "missing":
        return f"the key '{key}' is missing: add it"
    if kind == "union_tag_not_found":
        return f"'{key}' needs the key {context['discriminator']} to say which variant it is"
    if kind == "union_tag_invalid":
        tag_key = context["discriminator"].strip("'")
        return f"'{key}.{tag_key}' is '{context['tag']}': choose one of {context['expected_tags']}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind in _NOT_A_MAPPING:
        return f"'{key}' {_is(problem['input'], path)}: it should be a mapping of keys to values"
    # A key of several types has one problem for each.
    wishes = [str(p["msg"]) for p in problems if _locate(p["loc"], root)[0] == path]
    wish = ", or ".join(wishes).replace("Input should", "it should")
    wish = wish.replace("a valid tuple", "a list").replace("Tuple should", "the list should")
    return f"'{key}' {_is(problem['input'], path)}: {wish}"


def _is(value: Any, path: list[str]) -> str:
    return "is not right" if set(path) & set(MAY_HOLD_SECRETS) else f"is {value!r}"


def _unknown_key(path: list[str], known: list[str]) -> str:
    close = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known keys there: {', '.join(known)}"
    return f"unknown key '{'.'.join(path)}': {hint}"


def _locate(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[list[str], type[BaseModel] | None]:
    """The dotted path as the user wrote it (pydantic adds union tags), and the model it is in."""
    path: list[str] = []
    model: type[BaseModel] | None = root
    candidates: list[type[BaseModel]] = []
    for part in map(str, loc):
        tagged = [c for c in candidates if _has_tag(c, part)]
        if tagged:
            model, candidates = tagged[0], []
            continue
        if len(candidates) == 1:
            model = candidates[0]
        if part.startswith(_NOT_KEYS) or part in ("int", "str", "float"):
            continue
        path.append(part)
        info = model.model_fields.get(part) if model else None
        candidates = _models_in(info.annotation) if info else candidates
    return path, model


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    return any(
        tag in get_args(model.model_fields[name].annotation)
        for name in ("kind", "backend")
        if name in model.model_fields
    )


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
