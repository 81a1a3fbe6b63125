"""The wheel: it holds all that a run needs, and its command works away from the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e


def done(*command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It is built of a copy, since a build leaves its own files beside the source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "lmcot", source / "lmcot", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done(*pip, "-w", str(folder), str(source), cwd=folder)
    (built,) = folder.glob("lmcot-*.whl")
    return built


def test_it_holds_every_module_and_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lmcot").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted - names == set()


def test_its_command_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    done(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path)
    python = str(environment / "bin" / "python")
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    home = Path(done(python, "-c", asked, cwd=tmp_path).strip())
    zipfile.ZipFile(wheel).extractall(home)
    # What it depends on is that of this environment, behind its own modules.
    (home / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = done(python, "-c", "import lmcot; print(lmcot.__file__)", cwd=tmp_path)
    assert where.startswith(str(home))
    config = str(ROOT / "configs" / "smoke_t5.yaml")
    told = done(python, "-m", "lmcot.cli", "config", "--config", config, cwd=tmp_path)
    assert "random:t5" in told
    text = "from lmcot.config import SampleData; from lmcot.data import load_examples; "
    text += "print(len(load_examples(SampleData(kind='sample', split='train'), limit=3).examples))"
    assert done(python, "-c", text, cwd=tmp_path).strip() == "3"
