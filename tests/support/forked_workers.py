"""Ray workers that are forked from a process which has imported what they need.

A worker costs seven seconds of the CPU before it does anything, six of them for importing torch,
transformers and DeepSpeed, and the tests start hundreds. A fork of a process that has these is a
process of its own, which Ray watches and ends as any other; it only comes sooner. It imports Ray
and lmcot by itself. The commands that tests start as processes have plain workers.

Run as a program, this is what a raylet starts in place of Ray's worker: it hands its arguments,
its environment and its files to the process that forks, and ends.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADDRESS = "LMCOT_TEST_FORKS"
"""The environment variable that tells a worker-to-be the socket of the process that forks."""
PRELOADED = (
    "torch",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "accelerate",
    "deepspeed",
    "peft",
    "pydantic",
    "jsonschema",
    "requests",
)


@contextmanager
def forked_workers() -> Iterator[None]:
    """Has the clusters that this process starts meanwhile fork their workers."""
    from ray._private import services

    plain = services.start_raylet
    signature = inspect.signature(plain)
    worker = Path(services.__file__).parent / "workers" / "default_worker.py"
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="lmcot-forks-") as folder:
        address = Path(folder) / "socket"

        @functools.wraps(plain)
        def start_raylet(*given: Any, **named: Any) -> Any:
            if not started:
                started.append(_start(address))
            bound = signature.bind(*given, **named)
            bound.arguments["worker_path"] = __file__
            os.environ[ADDRESS] = f"{address}:{worker}"
            try:
                return plain(*bound.args, **bound.kwargs)
            finally:
                del os.environ[ADDRESS]

        services.start_raylet = start_raylet
        try:
            yield
        finally:
            services.start_raylet = plain
            for process in started:
                process.communicate()  # closes its input, at which it ends


@contextmanager
def plain_workers() -> Iterator[None]:
    """Has them start as at a user's again, where it matters what they import."""
    from ray._private import services

    forking = services.start_raylet
    services.start_raylet = forking.__wrapped__
    try:
        yield
    finally:
        services.start_raylet = forking


def _start(address: Path) -> subprocess.Popen[bytes]:
    """The process that forks; those that ask before it is ready wait."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen(64)
        number = listening.fileno()
        return subprocess.Popen(
            [sys.executable, __file__, "serve", str(number)],
            pass_fds=[number], stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip


def hand_over() -> None:
    """Has the process that forks go on as this one."""
    address, _, worker = os.environ.pop(ADDRESS).partition(":")
    about = {"argv": [worker, *sys.argv[1:]], "env": dict(os.environ), "cwd": str(Path.cwd())}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"f"], [0, 1, 2])
        connection.sendall(json.dumps(about).encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # empty, once it is forked


def serve(number: int) -> None:
    """Imports, and forks for each that asks, until its input is closed."""
    from lmcot import process

    process.use_threads(1)  # as in any actor: it leaves imports out, too
    for name in PRELOADED:
        importlib.import_module(name)
    process._prepared = False  # each actor does that by itself, with its own environment
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    listening = socket.socket(fileno=number)
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listening.accept()
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as sent:
            text = sent.read()
        forked = not os.fork()
        connection.close()
        if forked:
            listening.close()
            _become(json.loads(text), files)
        for file in files:
            os.close(file)


def _become(about: dict[str, Any], files: list[int]) -> None:
    """Is the worker that asked; does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(about["env"])
    os.chdir(about["cwd"])
    random.seed()
    sys.argv = about["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        hand_over()
