"""The commands of README.md as they stand there, with their defaults, on two CPUs or fewer."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.servers import free_port
from tests.support.documented import readme_commands

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# What a user must give; nothing of actors, serving or the learner.
MINE: dict[str, Any] = {
    "data": {
        "train": {"kind": "file", "path": "questions.jsonl"},
        "validation": {"kind": "sample", "split": "validation"},
        "max_validation": 2,
    },
    "policy": {"source": "random:llama", "max_new_tokens": 64},
    "frozen": {"backend": "transformers", "source": "random:llama"},
    "teacher": {"kind": "supporting_facts"},
    "refine": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    "checkpoints": {"every": 1},
}
# Where else README's commands are run, with fewer questions or files of their own, and by what
# words one sees it there.
ELSEWHERE = {
    "make quickstart": ("tests/e2e/test_smollm2.py", '"quickstart.yaml"'),
    "make guide": ("tests/unit/models/test_guides.py", '"guide.yaml"'),
    "make toy": ("tests/e2e/test_toy.py", "toy_config"),
    "make test": (".ci/run", "make test"),
    "make lint": (".ci/run", "make lint"),
    "make gpu-check": ("tests/unit/test_gpu_check.py", "-m benchmarks.gpu_check"),
    "lmcot train --data": ("tests/integration/test_python.py", '"train", "--data"'),
    "lmcot train --data questions.jsonl --small SOURCE --large SOURCE": (
        "tests/integration/test_python.py",
        '"train", "--data"',
    ),
    "lmcot init --data questions.jsonl --small SOURCE --large SOURCE --output my.yaml": (
        "tests/unit/tools/test_init.py",
        'main(["init", *given',
    ),
    "lmcot annotate --config my.yaml --run-dir runs/mine": (
        "tests/integration/test_tasks.py",
        '("annotate", "evaluate")',
    ),
    "lmcot distill --config my.yaml --run-dir runs/mine": (
        "tests/integration/test_t5_run.py",
        '("annotate", "distill", "refine", "evaluate")',
    ),
    "lmcot refine --config my.yaml --run-dir runs/mine refine.steps=200": (
        "tests/integration/test_t5_run.py",
        '("annotate", "distill", "refine", "evaluate")',
    ),
    "lmcot data --config my.yaml": (
        "tests/unit/tools/test_describe_data.py",
        '["data", "--config"',
    ),
    "lmcot aspects": ("tests/unit/rewards/test_learned.py", '["aspects", "score"'),
    "lmcot completion bash": ("tests/unit/test_arguments.py", '["completion", shell]'),
    "lmcot cache": ("tests/unit/frozen/test_cache.py", '["cache", "show"'),
    "lmcot export RUN --to wandb": ("tests/unit/tools/test_export.py", '"--to", "wandb"'),
    "lmcot debug": ("tests/integration/test_runtime.py", '"debug", "rollout"'),
    "lmcot reject --config my.yaml --run-dir runs/mine": (
        "tests/unit/extending/test_stage.py",
        "reject(run)",
    ),
    "lmcot sweep": ("tests/integration/test_sweep.py", '["sweep", "--config"'),
    "ray up": ("tests/support/local_up.py", "ray up -y"),
    "ray up cluster.yaml": ("tests/integration/test_aws.py", "cluster.yaml"),
}
HERE = {
    "lmcot train --config my.yaml --run-dir runs/mine",
    "lmcot evaluate --config my.yaml --run-dir runs/mine",
    "tensorboard --logdir runs/mine/tensorboard",
    "lmcot serve --run-dir runs/mine",
    "lmcot doctor --config my.yaml --run-dir runs/mine",
    "lmcot config --config FILE",
    "lmcot plan",
    "lmcot inspect",
    "lmcot compare",
    "lmcot serve",
}
READY_S = 300.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``my.yaml``, where all of it is run."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "my.yaml").write_text(yaml.safe_dump(MINE), encoding="utf-8")
    questions = [
        {
            "id": f"q{number}",
            "question": f"Which river does town {number} straddle?",
            "answer": f"river {number}",
            "context": [
                {"title": "Town", "sentences": [f"Town {number} straddles river {number}."]}
            ],
            "supporting_facts": [{"title": "Town", "sent_id": 0}],
        }
        for number in range(6)
    ]
    lines = "".join(json.dumps(one) + "\n" for one in questions)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    return folder


@contextmanager
def started(command: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """A command line as the user of an activated environment types it."""
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.Popen(
        shlex.split(command), cwd=home, text=True, start_new_session=True,
        env={**kept, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def run(command: str, home: Path) -> str:
    """What it printed; it has to succeed."""
    with started(command, home) as process:
        told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, f"{command}\n{told}"
    return told


def waited_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + READY_S
    while not what():
        if process.poll() is not None:
            pytest.fail(f"it ended: {process.communicate()[0]}")
        assert time.monotonic() < until, f"waited {READY_S:.0f} s"
        time.sleep(0.3)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return int(reply.status) == 200
    except OSError:
        return False


def test_every_command_is_run_somewhere() -> None:
    """A new one in README.md needs a test."""
    found = readme_commands()
    elsewhere = set(ELSEWHERE)
    assert not found - HERE - elsewhere
    assert HERE | elsewhere == found, "these are no longer in README.md"
    for command, (where, words) in ELSEWHERE.items():
        assert words in (ROOT / where).read_text(encoding="utf-8"), command


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """After `lmcot doctor`, `lmcot train` until Ctrl-C, and `lmcot evaluate`."""
    assert "all is well" in run("lmcot doctor --config my.yaml --run-dir runs/mine", home)
    run_dir = home / "runs" / "mine"

    def steps() -> int:
        metrics = run_dir / "metrics.jsonl"
        if not metrics.is_file():
            return 0
        lines = metrics.read_text(encoding="utf-8").splitlines()
        return sum('"stage": "refine"' in line for line in lines)

    command = "lmcot train --config my.yaml --run-dir runs/mine"
    with started(f"{command} refine.steps=200", home) as process:
        waited_for(lambda: steps() >= 2, process)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "annotate: 6 of 6 rationales kept" in told
    assert "rerun the same command to resume" in told
    run("lmcot evaluate --config my.yaml --run-dir runs/mine", home)
    assert (run_dir / "report.md").is_file()
    return home


def test_what_shows_a_run(trained: Path) -> None:
    printed = yaml.safe_load(run("lmcot config --config my.yaml", trained))
    assert printed["data"]["max_validation"] == 2
    assert "does not fit" not in run("lmcot plan --config my.yaml", trained)
    assert "Which river does town" in run("lmcot inspect runs/mine", trained)
    shutil.copytree(trained / "runs" / "mine", trained / "runs" / "other")
    assert "guided_distilled" in run("lmcot compare runs/mine runs/other", trained)
    port = free_port()
    with started(f"tensorboard --logdir runs/mine/tensorboard --port {port}", trained) as process:
        waited_for(lambda: answers(f"http://127.0.0.1:{port}/data/runs"), process)


def test_the_service_answers_and_ends(trained: Path) -> None:
    """With the replicas that it asks for by default, and a port that no other test uses."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = f"lmcot serve --run-dir runs/mine serve.port={port}"
    with started(command, trained) as process:
        assert process.stdout is not None
        # Ctrl-C before this line interrupts the start, even if requests are answered already.
        assert any(f" answers at {address}" in line for line in process.stdout)
        assert answers(f"{address}/readyz")
        asked = urllib.request.Request(
            f"{address}/v1/answer",
            json.dumps({"question": "Which river?", "context": "Elko straddles it."}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as reply:
            assert "answer" in json.load(reply)
        asked_at = time.monotonic()
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=60)
    assert time.monotonic() - asked_at < 45
    assert process.returncode == 0, told
