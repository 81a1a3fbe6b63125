"""docs/correctness.md and the tests agree on which test shows which property."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROPERTIES = range(1, 33)
_LEADING = re.compile(r"(?:\[\d+\] ?)+")


def numbered_tests() -> dict[str, set[int]]:
    """The numbers that the docstring of each test begins with, by ``FILE::NAME``."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                leading = _LEADING.match(ast.get_docstring(node) or "")
                numbers = re.findall(r"\d+", leading[0]) if leading else []
                name = f"{path.relative_to(ROOT).as_posix()}::{node.name}"
                found[name] = {int(number) for number in numbers}
    return found


def page() -> dict[int, list[str]]:
    """The tests that the page names for each property."""
    text = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    parts = re.split(r"^\*\*\[(\d+)\]\*\* ", text, flags=re.M)[1:]
    named = [re.findall(r"^- `(.+)`$", part, flags=re.M) for part in parts[1::2]]
    return dict(zip(map(int, parts[::2]), named, strict=True))


TESTS, PAGE = numbered_tests(), page()


def test_the_page_has_every_property_once_and_in_order() -> None:
    assert list(PAGE) == list(PROPERTIES)


@pytest.mark.parametrize("number", PROPERTIES)
def test_each_property_names_tests_that_show_it(number: int) -> None:
    """The tests are there, and their docstrings begin with its number."""
    assert PAGE[number], "no test is named"
    for name in PAGE[number]:
        assert name in TESTS, f"docs/correctness.md names {name}, which is not there"
        assert number in TESTS[name], f"the docstring of {name} does not begin with [{number}]"


def test_every_number_in_a_tests_docstring_is_a_property() -> None:
    assert set().union(*TESTS.values()) == set(PROPERTIES)
