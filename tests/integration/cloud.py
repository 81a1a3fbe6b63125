"""A cloud that is none: moto's server, a process on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TOOLS = Path(os.environ.get("LMCOT_CLOUD_TOOLS", Path(__file__).parents[2] / ".venv-cloud"))
needs_cloud = pytest.mark.skipif(
    not (TOOLS / "bin" / "moto_server").exists(), reason="needs moto: run `make cloud-tools`"
)


def settings(endpoint: str) -> dict[str, str]:
    """Environment of those who are to take it for AWS."""
    return {
        "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


@contextmanager
def cloud() -> Iterator[str]:
    """One with nothing in it; its endpoint."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(
        [str(TOOLS / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "moto's server ended"
                time.sleep(0.1)
        else:
            pytest.fail("waited 30 s for moto's server")
        yield url
    finally:
        process.terminate()
        process.wait(30)
