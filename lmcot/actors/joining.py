"""Looks at a Ray cluster before it is joined.

Ray itself waits for a cluster that is gone for a quarter of an hour and cannot be interrupted. So
its address is tried first, then the whole of `ray.init` in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import IO

from ray._private.services import canonicalize_bootstrap_address

from lmcot.errors import UserError
from lmcot.monitor.progress import say

_ANSWER_LIMIT_S = 10.0
"""How long an address may stay without anybody who answers: a head that is just starting."""
_TELL_AFTER_S = 5.0
_CLIENT_PORT = 10001
_REHEARSAL = """
import json, logging, sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except BaseException as error:
    print(json.dumps([type(error).__name__, str(error)]), flush=True)
    sys.exit(1)
ray.shutdown()
"""
_SIGNS = {
    "token": "set the cluster's token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token)",
    "version": "install the versions of Ray and Python that the cluster has",
    "raylet": "run lmcot on a node of the cluster ('ray start --address=...' makes this one)",
}
"""What to do, by a word of Ray's message."""


def check_cluster(address: str, limit_s: float) -> None:
    """Looks whether a cluster can be joined from here.

    Args:
        address: as `ray.init` takes it.
        limit_s: how long it may take.

    Raises:
        UserError: if it cannot, or not within the limit.
    """
    host, port = _endpoint(address)
    started = time.monotonic()
    _wait_for_answer(address, host, port, min(limit_s, _ANSWER_LIMIT_S))
    _rehearse(address, max(limit_s - (time.monotonic() - started), 1.0))


def _endpoint(address: str) -> tuple[str, int]:
    """Host and port that an address stands for."""
    try:
        if address.startswith("ray://"):
            host_port = address.removeprefix("ray://").partition("/")[0]
        else:
            host_port = canonicalize_bootstrap_address(address) or ""
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at '{address}' cannot be joined: {str(error).splitlines()[0]}"
        ) from None
    host, _, port = host_port.rpartition(":")
    if address.startswith("ray://") and not port.isdecimal():
        host, port = host_port, str(_CLIENT_PORT)
    if not host or not port.isdecimal():
        raise UserError(
            f"the Ray address '{address}' is not of the form HOST:PORT, ray://HOST:PORT or auto: "
            "correct actors.address or RAY_ADDRESS"
        )
    return host.strip("[]"), int(port)


def _wait_for_answer(address: str, host: str, port: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    told = False
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(left, 0.1)):
                return
        except socket.gaierror as error:
            reason = f"{host}: {error.strerror}"
            break
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if deadline - time.monotonic() < 0.5:
            break
        if not told:
            say(f"waiting up to {limit_s:.0f} s for the Ray cluster at '{address}' ({reason})")
            told = True
        time.sleep(0.5)
    raise UserError(
        f"no Ray cluster answers at '{address}' ({reason}): start it, or correct actors.address or "
        "RAY_ADDRESS; without either a cluster is started on this machine"
    )


def _rehearse(address: str, limit_s: float) -> None:
    """Joins the cluster in a process of its own, whose log is not shown."""
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _REHEARSAL, address],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = _wait(process, address, limit_s)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return
        texts = [_read(one) for one in (told, log)]
    if code is None:
        raise UserError(
            f"something answers at '{address}', but no Ray cluster that could be joined within "
            f"{limit_s:.0f} s: look at its address and port ('ray status' there), or raise "
            "actors.start_timeout_s"
        )
    raise UserError(f"the Ray cluster at '{address}' cannot be joined: {_reason(*texts)}")


def _wait(process: subprocess.Popen[bytes], address: str, limit_s: float) -> int | None:
    """The exit code; None if the process took too long."""
    first = min(_TELL_AFTER_S, limit_s)
    with suppress(subprocess.TimeoutExpired):
        return process.wait(first)
    if limit_s > first:
        say(f"waiting up to {limit_s:.0f} s for the Ray cluster at '{address}' to let us join")
        with suppress(subprocess.TimeoutExpired):
            return process.wait(limit_s - first)
    return None


def _reason(told: str, log: str) -> str:
    """One sentence from what Ray raised, or else from the last line of its log."""
    try:
        name, message = json.loads(told.splitlines()[-1])
        reason = f"{message.strip().splitlines()[0]} ({name})" if message.strip() else name
    except (ValueError, IndexError):
        lines = [line for line in log.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else "its driver ended without a word"
    for sign, remedy in _SIGNS.items():
        if sign in (told + log).lower():
            return f"{reason}: {remedy}"
    return reason


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
