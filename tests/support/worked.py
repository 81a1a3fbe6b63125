"""The worked examples of docs/extending.md, as the tests run them."""

from __future__ import annotations

import re
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
_FENCE = re.compile(r"^```python(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$", re.M | re.S)


def section(title: str) -> str:
    """The text of one section of the page, its heading left out.

    Raises:
        LookupError: if the page has no such section.
    """
    page = _PAGE.read_text(encoding="utf-8")
    for part in page.split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        if heading.strip() == title:
            return text
    raise LookupError(f"docs/extending.md has no section '{title}'")


def python_blocks(title: str) -> list[str]:
    """The Python code blocks of a section, in their order.

    Raises:
        LookupError: if the page has no such section, or the section has no Python.
    """
    blocks = [found["code"] for found in _FENCE.finditer(section(title))]
    if not blocks:
        raise LookupError(f"the section '{title}' of docs/extending.md has no Python")
    return blocks
