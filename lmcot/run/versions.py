"""The versions of software that a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from lmcot.version import __version__

_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of the main packages, and the git commit that lmcot runs from, if any."""
    found = {"lmcot": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = _git_commit()
    return found


def _git_commit() -> str:
    source = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
