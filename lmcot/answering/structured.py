"""An answer as a JSON object that fits a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.validators import extend
from pydantic_core import SchemaError as PatternError
from pydantic_core import SchemaValidator, core_schema
from referencing import Registry

from lmcot.text.answers import normalize_answer

LONGEST_SCHEMA = 20_000
"""Longest schema, in characters."""
_STEPS = 4_000
"""How many keywords of a schema are checked for one object: nested alternatives multiply."""
_TRIES = 64
"""How many places in a text are tried as the beginning of an object."""
_RATIONALES = frozenset(
    {"reasoning", "rationale", "explanation", "thought", "thoughts", "thinking"}
    | {"chain_of_thought", "justification"}
)
"""Names of fields that get the rationale."""
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_NOT_OFFERED = {"$dynamicRef": str, "$id": str, "$anchor": str, "patternProperties": dict}
_TRUTHS = {"yes": True, "true": True, "no": False, "false": False}


class _TooMuch(Exception):
    """Checking the schema takes more steps than a sensible schema needs."""


@dataclass(frozen=True, slots=True)
class Form:
    """The object that an answer is put into."""

    schema: dict[str, Any]
    open: bool = False
    """Whether the schema names no fields: the answer may then stand in a field ``answer``."""

    @property
    def text(self) -> str:
        """The schema as a model reads it."""
        return json.dumps(self.schema, ensure_ascii=False)

    def filled(self, answer: str, rationale: str) -> dict[str, Any] | None:
        """The object with the answer in its one field, and the rationale in a field for reasoning.

        None if the schema has several fields that are not for reasoning, or the answer does not
        fit.
        """
        properties = self._resolved(self.schema).get("properties")
        if not isinstance(properties, dict):
            return None
        if not properties:
            return {} if self.fault({}) is None else None
        reasons = [name for name in properties if name.lower() in _RATIONALES]
        fields = [name for name in properties if name not in reasons]
        if not fields:  # what is called reasoning is all that is asked for
            reasons, fields = reasons[1:], reasons[:1]
        if len(fields) != 1:
            return None
        values = {repr(one): one for one in self._values(properties[fields[0]], answer)}
        for value in values.values():
            found = {name: value if name == fields[0] else rationale for name in properties}
            if self.fault(found) is None:
                return found
        return None

    def fault(self, found: Any) -> str | None:
        """Why an object does not fit; None if it does."""
        try:
            first = next(iter(_validator(self.schema).iter_errors(found)), None)
        except (_TooMuch, RecursionError):
            return "the schema takes too many steps to check"
        if first is None:
            return None
        where = ".".join(str(part) for part in first.absolute_path)
        return f"{where or 'the object'}: {first.message[:200]}"

    def read(self, text: str) -> tuple[dict[str, Any] | None, str]:
        """The first object in a text that fits the schema, else the reason why there is none."""
        reason = "it holds no JSON object"
        for found in objects_in(text):
            fault = self.fault(found)
            if fault is None:
                return found, ""
            reason = fault
        return None, reason

    def _resolved(self, schema: Any) -> dict[str, Any]:
        """A schema with its references followed."""
        for _ in range(16):
            if not isinstance(schema, dict):
                return {}
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            schema = _at(self.schema, reference)
        return {}

    def _values(self, schema: Any, answer: str, depth: int = 4) -> Iterator[Any]:
        """Values of a schema that an answer can stand for."""
        found = self._resolved(schema)
        for way in ("anyOf", "oneOf", "allOf"):
            for one in found.get(way, []) if depth else []:
                yield from self._values(one, answer, depth - 1)
        for one in found.get("enum", [found["const"]] if "const" in found else []):
            if isinstance(one, str) and normalize_answer(one) == normalize_answer(answer):
                yield one
        kind = found.get("type")
        kinds = kind if isinstance(kind, list) else ["string"] if kind is None else [kind]
        for one in kinds:
            yield from _as(one, answer)


def _as(kind: Any, answer: str) -> Iterator[Any]:
    if kind == "string":
        yield answer
    elif kind == "boolean":
        words = normalize_answer(answer)
        if words in _TRUTHS:
            yield _TRUTHS[words]
    elif kind in ("integer", "number"):
        numbers = _NUMBER.findall(answer)
        if len(numbers) == 1 and len(numbers[0]) <= 40:
            number = float(numbers[0].replace(",", ""))
            whole = "." not in numbers[0]
            yield int(numbers[0].replace(",", "")) if whole else number


def read_form(schema: Mapping[str, Any]) -> Form:
    """The form that a schema describes.

    Raises:
        ValueError: if it is not a JSON schema of an object, is too long, or refers elsewhere.
    """
    given = dict(schema)
    try:
        length = len(json.dumps(given, ensure_ascii=False))
    except (ValueError, RecursionError):
        raise ValueError("the schema is not JSON") from None
    if length > LONGEST_SCHEMA:
        raise ValueError(f"the schema has {length} characters, more than {LONGEST_SCHEMA}")
    try:
        Draft202012Validator.check_schema(given)
    except SchemaError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        raise ValueError(f"this is not a JSON schema: {where}: {error.message[:200]}") from None
    _check_keywords(given, given)
    root = Form(given)._resolved(given)
    if root.get("type", "object") != "object":
        raise ValueError("the schema must be one of an object")
    return Form(given, open="properties" not in root)


def _check_keywords(part: Any, root: dict[str, Any]) -> None:
    """Checks that references stay within the schema, and that patterns take linear time."""
    if isinstance(part, list):
        for one in part:
            _check_keywords(one, root)
    if not isinstance(part, dict):
        return
    reference = part.get("$ref")
    if isinstance(reference, str):
        _at(root, reference)
    for word, kind in _NOT_OFFERED.items():
        if isinstance(part.get(word), kind):
            raise ValueError(f"the schema's '{word}' is not offered")
    if isinstance(part.get("pattern"), str):
        _pattern(part["pattern"])
    for one in part.values():
        _check_keywords(one, root)


def _at(root: dict[str, Any], reference: str) -> Any:
    """The part of the schema that a local reference names."""
    found: Any = root
    if not reference.startswith("#"):
        raise ValueError(f"the schema refers elsewhere: '{reference[:100]}'")
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"the schema refers to what it does not hold: '{reference[:100]}'")
        found = found[name]
    return found


def _pattern(pattern: str) -> SchemaValidator:
    """A pattern that matches in linear time; Python's own may not."""
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except PatternError:
        raise ValueError(f"the schema's pattern '{pattern[:100]}' is not offered") from None


def _validator(schema: dict[str, Any]) -> Any:
    """Checks objects in a bounded number of steps; fetches nothing."""
    left = _STEPS

    def counted(keyword: Any) -> Any:
        def check(*given: Any) -> Iterator[Any]:
            nonlocal left
            left -= 1
            if left < 0:
                raise _TooMuch
            yield from keyword(*given) or ()

        return check

    def pattern(validator: Any, wanted: str, found: Any, _: Any) -> Iterator[Any]:
        if isinstance(found, str) and not _pattern(wanted).isinstance_python(found):
            yield ValidationError(f"{found!r} does not match {wanted!r}")

    words = {**Draft202012Validator.VALIDATORS, "pattern": pattern}
    made = extend(Draft202012Validator, {word: counted(one) for word, one in words.items()})
    return made(schema, registry=Registry())


def form_in(text: str) -> Form | None:
    """The form that an instruction shows: a JSON schema, or an example of an object."""
    shown = None
    for found in objects_in(text):
        if isinstance(found.get("properties"), dict):
            try:
                return read_form(found)
            except ValueError:
                continue
        if shown is None and found:
            shown = {"type": "object", "properties": {key: {} for key in found},
                     "required": list(found)}  # fmt: skip
    return None if shown is None else read_form(shown)


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text."""
    decoder, at = json.JSONDecoder(parse_constant=_no_number), 0
    for _ in range(_TRIES):
        at = text.find("{", at)
        if at < 0:
            return
        try:
            found, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        yield found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
