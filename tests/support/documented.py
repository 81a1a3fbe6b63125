"""Settings that the documentation shows."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml


def placement() -> dict[str, Any]:
    """``actors`` of docs/cluster.md: which node type each role goes to."""
    path = Path(__file__).parents[2] / "docs" / "cluster.md"
    block = re.search(
        r"^    actors:\n(?:     .*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert block is not None
    settings: dict[str, Any] = yaml.safe_load(textwrap.dedent(block[0]))
    return dict(settings["actors"])


def readme_commands() -> set[str]:
    """README.md's command lines: those of its code blocks, and those within its sentences."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    program = r"(?:make|lmcot|tensorboard|ray|serve|pip)"
    blocks = re.findall(rf"^    ({program} [^#\n]*)", text, re.MULTILINE)
    # A sentence may break its line within a command.
    within = re.findall(rf"`({program}\s[a-z][^`]*)`", text)
    return {" ".join(one.split()) for one in [*blocks, *within]}
