"""YAML as people mean it: only the plain words true and false are booleans."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+")
_NUMBER = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
"""All of these are also numbers to `yaml.safe_dump`, which quotes text that looks like one."""


class _TextLoader(yaml.SafeLoader):
    """Every plain scalar is text, except null. A mapping may hold a key only once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise ConstructorError(
                        None, None, f"the key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Loader(_TextLoader):
    """YAML 1.2's booleans and numbers: ``off``, ``no``, dates and clock times stay text."""


def _add(loader: type[_TextLoader], kind: str, pattern: re.Pattern[str], first: str | None) -> None:
    whole = re.compile(f"(?:{pattern.pattern})\\Z")
    loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", whole, first and list(first))


_add(_TextLoader, "merge", re.compile("<<"), "<")
_add(_TextLoader, "null", _NULL, None)
_add(_Loader, "bool", _BOOLEAN, "tTfF")
_add(_Loader, "int", _INTEGER, "-+0123456789")
_add(_Loader, "float", _NUMBER, "-+.0123456789")


def parse_yaml(text: str, *, as_text: bool = False) -> Any:
    """The value of a YAML document; ``as_text`` keeps numbers and booleans as they are written.

    Raises:
        yaml.YAMLError: if it is not valid YAML, or names a key twice.
    """
    return yaml.load(text, Loader=_TextLoader if as_text else _Loader)
