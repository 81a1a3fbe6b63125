"""Messages of dspy's adapters: inputs in fields, and the fields of the reply.

The messages describe the form of the reply in words only, so it is read out of the words.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FIELD = re.compile(r"^\[\[ ## (\w{1,100}) ## \]\][ \t]*$", re.MULTILINE)
_REPLY = "\n\nRespond with "
"""The beginning of what dspy says about the reply, below the last field."""
_AS_JSON = "a JSON object in the following order of fields: "
_AS_FIELDS = "the corresponding output fields, starting with the field "
_WANTED = re.compile(
    r"`(?:\[\[ ## )?(\w{1,100})(?: ## \]\])?`"
    r"(?: \(must be formatted as a valid Python ([^()]{1,200})\))?"
)
_OBJECTIVE = "In adhering to this structure, your objective is:"
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}


@dataclass(frozen=True, slots=True)
class FieldsWanted:
    """The fields of a reply."""

    properties: Mapping[str, dict[str, Any]]
    """JSON schemas by name."""
    as_json: bool
    """Whether the reply is a JSON object, not fields below marks."""

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of an object with all fields."""
        names = list(self.properties)
        return {"type": "object", "properties": dict(self.properties), "required": names}

    def written(self, found: Mapping[str, Any]) -> str:
        """An object in the form that dspy wants."""
        if self.as_json:
            return json.dumps(found, ensure_ascii=False)
        parts = [
            f"[[ ## {name} ## ]]\n{value if isinstance(value, str | bool) else json.dumps(value)}"
            for name, value in found.items()
        ]
        return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def read_fields(text: str) -> list[tuple[str, str]]:
    """The fields of a message, as names and texts."""
    marks = list(_FIELD.finditer(text))
    ends = [*(one.start() for one in marks[1:]), len(text)]
    return [
        (mark[1].lower(), text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=False)
    ]


def split_wish(text: str) -> tuple[str, FieldsWanted | None]:
    """The last field's text, and the fields that the text below it asks for."""
    body, mark, wish = f"\n\n{text}".rpartition(_REPLY)
    if not mark:
        return text, None
    as_json = wish.startswith(_AS_JSON)
    if not as_json and not wish.startswith(_AS_FIELDS):
        return text, None
    properties = {
        name: _schema(kind) for name, kind in _WANTED.findall(wish) if name != "completed"
    }
    return body.strip(), FieldsWanted(properties, as_json) if properties else None


def objective_of(system: str) -> str:
    """The objective in a system message, without the description of the form."""
    _, mark, objective = system.partition(_OBJECTIVE)
    return objective.strip() if mark else system


def _schema(kind: str) -> dict[str, Any]:
    if not kind:
        return {"type": "string"}
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    if kind.startswith("Literal[") and kind.endswith("]"):
        try:
            return {"enum": list(ast.literal_eval(f"[{kind[8:-1]}]"))}
        except (ValueError, SyntaxError):
            pass
    return {}
