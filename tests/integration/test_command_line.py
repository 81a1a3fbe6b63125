"""Mistakes on the command line: one sentence, exit code 2, and no cluster was ever started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Importing Ray and transformers takes seconds: one process runs all commands, one after another.
RUN_ALL = """
import contextlib, io, json, sys, traceback
from lmcot.cli import main

results = {}
for name, arguments in json.load(sys.stdin).items():
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
    results[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(results))
"""
GOOD = {
    "id": "q1",
    "question": "Which river does Elko straddle?",
    "answer": "Humboldt River",
    "context": [{"title": "Elko", "sentences": ["Elko straddles the Humboldt River."]}],
    "supporting_facts": [{"title": "Elko", "sent_id": 0}],
}
SETTINGS: dict[str, Any] = {
    "data": {"validation": {"kind": "counting", "examples": 2}},
    "policy": {"source": "random:llama"},
    "frozen": {"backend": "transformers", "source": "random:llama"},
    "teacher": {"kind": "supporting_facts"},
}


@dataclass
class Place:
    """Where the commands run: settings, data, and Ray's own folder to look for traces in."""

    folder: Path
    config: Path
    ray: Path

    def data(self, name: str, *lines: str) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("\n".join([json.dumps(GOOD), *lines]) + "\n", encoding="utf-8")
        return f"data.train={{kind: file, path: {path}}}"

    def python(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        hidden = {"RAY_ADDRESS", "OPENAI_API_KEY", "TRANSFORMERS_VERBOSITY"}
        kept = {key: value for key, value in os.environ.items() if key not in hidden}
        return subprocess.run(
            [sys.executable, *arguments],
            env={**kept, "RAY_TMPDIR": str(self.ray), "OMP_NUM_THREADS": "1"},
            cwd=ROOT, input=stdin, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def no_cluster_was_started(self) -> bool:
        lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        return not list(self.ray.iterdir()) and not any(str(self.ray) in line for line in lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("command-line")
    place = Place(folder, folder / "config.yaml", folder / "ray")
    place.ray.mkdir()
    source = place.data("good").removeprefix("data.train=")
    data = {"train": yaml.safe_load(source), **SETTINGS["data"]}
    place.config.write_text(yaml.safe_dump({**SETTINGS, "data": data}), encoding="utf-8")
    return place


def bad_record(**changes: Any) -> str:
    return json.dumps({**GOOD, "id": "q2", **changes})


@pytest.fixture(scope="module")
def results(place: Place, model_cache: Path) -> dict[str, tuple[int | None, str, str]]:
    """Exit code, stdout and stderr of every command."""
    folder = place.folder
    (folder / "file").touch()
    (folder / "no-model").mkdir()
    begun = folder / "begun"
    begun.mkdir()
    values = yaml.safe_load(place.config.read_text(encoding="utf-8"))
    (begun / "config.yaml").write_text(yaml.safe_dump({**values, "seed": 7}), encoding="utf-8")
    (begun / "stages.json").write_text('{"refine": {"steps": 1}}', encoding="utf-8")
    no_answer = json.dumps({k: v for k, v in GOOD.items() if k != "answer"})
    endpoint = "backend: openai, base_url: 'https://api.example.com/v1', model: m"
    cases: dict[str, tuple[Path, list[str]]] = {
        "misspelt key": (folder / "run", ["refine.stps=1"]),
        "broken line": (folder / "run", [place.data("broken", '{"id": ')]),
        "empty context": (folder / "run", [place.data("context", bad_record(context=[]))]),
        "missing answer": (folder / "run", [place.data("answer", no_answer)]),
        "no policy": (folder / "run", [f"policy.source={folder / 'no-model'}"]),
        "no frozen model": (folder / "run", [f"frozen.source={folder / 'no-model'}"]),
        "no key": (folder / "run", [f"frozen={{{endpoint}}}"]),
        "no templates": (folder / "run", ["prompts.templates=mine"]),
        "fixed key": (begun, ["refine.steps=1"]),
        "below a file": (folder / "file" / "run", []),
    }
    commands = {
        name: ["train", "--config", str(place.config), "--run-dir", str(run_dir), *overrides]
        for name, (run_dir, overrides) in cases.items()
    }
    done = place.python("-c", RUN_ALL, stdin=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int | None, str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("misspelt key", "unknown key 'refine.stps': did you mean 'steps'?"),
        ("broken line", "broken.jsonl:2: the line is not valid JSON"),
        ("empty context", "context.jsonl:2: "),
        ("missing answer", "answer.jsonl:2: "),
        ("no policy", "is not a model: it holds no config.json"),
        ("no frozen model", "is not a model: it holds no config.json"),
        ("no key", "the environment variable OPENAI_API_KEY is not set"),
        ("no templates", "there are no templates named 'mine'"),
        ("fixed key", "was created with another value of seed: restore it"),
        ("below a file", "cannot be written (Not a directory): choose another with --run-dir"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr(
    results: dict[str, tuple[int | None, str, str]], place: Place, name: str, words: str
) -> None:
    code, out, err = results[name]
    assert code == 2, err
    assert out == ""
    progress = ("data.train: ", "data.validation: ")
    lines = [line for line in err.splitlines() if not line.startswith(progress)]
    assert len(lines) == 1, err
    assert lines[0].startswith("lmcot: ")
    assert words in lines[0]
    assert place.no_cluster_was_started()


def test_a_mistake_does_not_settle_what_the_run_began_with(
    results: dict[str, tuple[int | None, str, str]], place: Place
) -> None:
    """Once it is mended, the same run directory can be used."""
    assert results
    assert not (place.folder / "run" / "config.yaml").exists()


def test_the_process_itself_ends_with_the_sentence(place: Place) -> None:
    """As a user sees it: the libraries' notices included."""
    broken = place.data("own", "no JSON")
    run_dir = str(place.folder / "own")
    done = place.python(
        "-m", "lmcot.cli", "refine", "--config", str(place.config), "--run-dir", run_dir, broken
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("lmcot: ")
    assert "own.jsonl:2: the line is not valid JSON" in line
    assert place.no_cluster_was_started()


def test_config_prints_settings_that_load(place: Place) -> None:
    command = ("-m", "lmcot.cli", "config", "--config")
    done = place.python(*command, "configs/quickstart.yaml", "seed=3")
    assert done.returncode == 0, done.stderr
    printed = place.folder / "printed.yaml"
    printed.write_text(done.stdout, encoding="utf-8")
    again = place.python(*command, str(printed))
    assert again.stdout == done.stdout
    assert yaml.safe_load(done.stdout)["seed"] == 3


def test_config_refuses_a_misspelt_key(place: Place) -> None:
    misspelt = place.folder / "misspelt.yaml"
    misspelt.write_text(f"polcy: {{}}\n{place.config.read_text()}", encoding="utf-8")
    done = place.python("-m", "lmcot.cli", "config", "--config", str(misspelt))
    assert done.returncode == 2
    assert done.stderr == "lmcot: unknown key 'polcy': did you mean 'policy'?\n"
