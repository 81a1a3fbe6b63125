"""A run from a file of questions and two models: on the command line, and in a notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmcot
from lmcot.cli import main

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
pytestmark = pytest.mark.e2e

SMALL = (
    "data.max_validation=2", "prompts.demonstrations=0", "distill.epochs=1", "refine.steps=1",
    "refine.prompts_per_step=2", "refine.samples_per_prompt=2", "evaluate.rows=[standard]",
    "evaluate.aspect_questions=0", "rewards.aspects={}", "policy.dtype=float32",
    "policy.max_new_tokens=64", "frozen.dtype=float32", "frozen.max_rationale_tokens=8",
)  # fmt: skip
"""As little of everything as there can be."""


def questions(folder: Path) -> str:
    passage = "Town {0} straddles river {0}."
    lines = [
        {
            "id": f"q{number}",
            "question": f"Which river does town {number} straddle?",
            "answer": f"river {number}",
            "context": [["Town", [passage.format(number)]]],
            "supporting_facts": [["Town", 0]],
        }
        for number in range(24)
    ]
    file = folder / "towns.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return file.name


@pytest.mark.usefixtures("cluster")
def test_a_whole_command_and_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    models = ["--small", "random:llama", "--large", "random:llama"]
    command = ["train", "--data", questions(tmp_path), *models, *SMALL]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert Path("runs/towns/settings.yaml").read_text() in told
    run = lmcot.Results("runs/towns")
    assert list(run.policies) == ["distilled", "refined"]
    assert [one.name for one in run.report or ()] == ["standard"]
    assert [one["step"] for one in run.metrics("refine")] == [1]
    assert len(run.rollouts()) == 4
    assert len(run.predictions("standard")) == 2
    # The same again resumes, and finds all of it done; so does Python.
    assert main(command) == 0
    assert "refine: done already, 1 steps" in capsys.readouterr().err
    again = lmcot.evaluate(run_dir="runs/towns", overrides={"evaluate.rows": ["cot"]})
    assert [one.name for one in again.report or ()] == ["cot"]


@pytest.mark.skipif(not CLIENTS.exists(), reason="needs Jupyter: make client-tools")
def test_the_notebook_of_the_documentation(tmp_path: Path) -> None:
    notebook = ROOT / "docs" / "python.ipynb"
    done = subprocess.run(
        [str(CLIENTS), str(ROOT / "tests/support/client_programs.py"), "notebook", str(notebook)],
        cwd=tmp_path, env={**os.environ, "LMCOT_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    cells: list[dict[str, Any]] = json.loads(done.stdout)["cells"]
    outputs = [
        "".join(one["data"].get("text/plain", ""))
        for cell in cells
        for one in cell.get("outputs", ())
        if one["output_type"] == "execute_result"
    ]
    assert len(outputs) == 7, outputs
    assert "So the answer is river" in outputs[1]
    assert "refined" in outputs[2]
    assert "component/custom/brevity" in outputs[3]
    assert "guided_refined" in outputs[5]
