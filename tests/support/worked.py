"""The worked examples of docs/extending.md, as the tests run them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
_ROOT = Path(__file__).parents[2]
_FILE = re.compile(
    r"^```(?P<kind>python|diff) title=\"(?P<name>[^\"]+)\"\n(?P<text>.*?)^```$", re.M | re.S
)
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


def extended_product(title: str, root: Path) -> list[str]:
    """Copies the product below ``root`` and follows a section to the letter.

    A ``diff`` block changes a file: of each hunk the lines of before must stand in it exactly once.
    A ``python`` block is a new file.

    Returns:
        the files that were changed or added.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_ROOT / "lmcot", root / "lmcot", ignore=ignored)
    touched = []
    for found in _FILE.finditer(section(title)):
        path = root / found["name"]
        if found["kind"] == "python":
            assert not path.exists(), f"{path} is there already"
            path.write_text(found["text"], encoding="utf-8")
        else:
            path.write_text(_patched(path, found["text"]), encoding="utf-8")
        touched.append(found["name"])
    return touched


def _patched(path: Path, diff: str) -> str:
    text = path.read_text(encoding="utf-8")
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(before) == 1, f"these lines are not in {path} once:\n{before}"
        text = text.replace(before, after)
    return text
