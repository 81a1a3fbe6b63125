"""What stands on a command line, in any order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmcot.arguments import SHELLS, parse_arguments
from lmcot.cli import main


@pytest.mark.parametrize(
    "line",
    [
        "refine a=1 b.c=-2 --config C --run-dir R",
        "refine --config C --run-dir R a=1 b.c=-2",
        "refine --config C a=1 --run-dir R b.c=-2",
        "refine a=1 --run-dir=R --config=C b.c=-2",
        "debug rollout a=1 --config C --steps 4 b.c=-2 --run-dir R",
        "sweep --space S a=1 --config C b.c=-2 --run-dir R --retry-failed",
        "evaluate a=1 --run-dir R --of Q b.c=-2",
        "doctor a=1 --config C b.c=-2",
    ],
)
def test_settings_stand_on_any_side_of_an_option(line: str) -> None:
    assert parse_arguments(line.split()).overrides == ["a=1", "b.c=-2"]


@pytest.mark.parametrize(
    "line",
    ["refine a=1 --config C --bogus b=2 --run-dir R", "inspect R S", "cache show a=1"],
)
def test_what_is_unknown_is_still_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(line.split())
    assert "unrecognized arguments: " in capsys.readouterr().err


def test_completion_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'lmcot[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("refine", "inspect", "run-dir"))
    if shell == "bash":
        file = tmp_path / "lmcot.bash"
        file.write_text(script, encoding="utf-8")
        asked = "COMP_WORDS=(lmcot ref) COMP_CWORD=1; COMP_LINE='lmcot ref'; COMP_POINT=9; "
        completes = "$(complete -p lmcot | sed 's/.*-F //; s/ .*//') lmcot ref lmcot"
        ask = f"source {file}; {asked} {completes}"
        told = subprocess.run(
            ["bash", "-c", f"{ask}; echo ${{COMPREPLY[@]}}"], text=True, capture_output=True
        )
        assert "refine" in told.stdout, told.stderr


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse_arguments(["refine", "--config", "~/c.yaml", "--run-dir=~/run"])
    assert options.run_dir == tmp_path / "run"
    options = parse_arguments(["compare", "~/a", "--json", "~/b.json", "~/c"])
    assert options.runs == [tmp_path / "a", tmp_path / "c"]
    assert options.json == tmp_path / "b.json"
