"""TensorBoard's server, and waiting for what it shows."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LIMIT_S = 120.0


def wait_for(what: str, look: Callable[[], Any]) -> Any:
    """What ``look`` finds, once that is something."""
    deadline = time.monotonic() + _LIMIT_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not come within {_LIMIT_S:.0f} s"
        time.sleep(0.5)
    return found


@contextmanager
def tensorboard(runs: Path | str, folder: Path) -> Iterator[str]:
    """A server of its own, whose log is left in ``folder``; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", "0"]
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--reload_interval", "1"],
            stdout=subprocess.DEVNULL, stderr=file,
        )  # fmt: skip
    try:

        def address() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"at (http://127\.0\.0\.1:\d+)/", log.read_text())
            return found[1] if found else None

        yield wait_for("TensorBoard's server", address)
    finally:
        process.terminate()
        process.wait(timeout=30)
