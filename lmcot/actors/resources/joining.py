"""Checks a Ray cluster before it is joined.

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

from lmcot.errors import UserError, first_line
from lmcot.monitor.progress import say

_ANSWER_LIMIT_S = 10.0
"""Time limit for an address to answer: a head may be just starting."""
_TELL_AFTER_S = 5.0
_CLIENT_PORT = 10001
_REHEARSAL = """
import json, logging, sys
import ray
# Ray's client does not raise what the cluster answers, but logs it between its tries.
client = logging.getLogger("ray.util.client.worker")
client.setLevel(logging.DEBUG)
client.addFilter(lambda record: record.getMessage().startswith("Received when checking init"))
client.addHandler(logging.StreamHandler())
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except BaseException as error:
    print(json.dumps([type(error).__name__, str(error)]), flush=True)
    sys.exit(1)
ray.shutdown()
"""
_USUAL_TOKEN = "~/.ray/auth_token"
_NO_TOKEN = ("InvalidAuthToken", "Invalid or missing authentication token", "AuthenticationError")
"""Phrases of Ray's log or messages if the cluster refuses a token, or there is none."""
_HOPELESS = (
    (
        "Failed to connect to",
        2,
        "what answers there does not speak Ray's protocol: correct the port (6379 is usual, "
        f"{_CLIENT_PORT} for ray://)",
    ),
    ("Failed to get cluster ID", 10, "it does not give its id: check it with 'ray status'"),
)
"""Phrases of Ray's log, how often they appear if joining never ends, and what they mean."""
_SIGNS = {
    "version": "install the versions of Ray and Python that the cluster has",
    "raylet": "run lmcot on a node of the cluster ('ray start --address=...' makes this one)",
}
"""The remedy for each word of Ray's message."""


def check_cluster(address: str, limit_s: float) -> None:
    """Checks that a cluster can be joined from here.

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
    """The host and port of an address."""
    try:
        if address.startswith("ray://"):
            host_port = address.removeprefix("ray://").partition("/")[0]
        else:
            host_port = canonicalize_bootstrap_address(address) or ""
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at '{address}' cannot be joined: {first_line(error)}"
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
    """Joins the cluster in a separate process, whose log is not shown."""
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _REHEARSAL, address],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=log,
            start_new_session=True,
        )
        try:
            reason = _watch(process, log, address, limit_s)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            return
        reason = reason or _reason(_read(told), _read(log))
    raise UserError(f"the Ray cluster at '{address}' cannot be joined: {reason}")


def _watch(process: subprocess.Popen[bytes], log: IO[bytes], address: str, limit_s: float) -> str:
    """Waits for the process to end; returns why it will not, if that shows before."""
    started = time.monotonic()
    told = False
    while (passed := time.monotonic() - started) < limit_s:
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(0.5, limit_s))
            return ""
        text = _read(log)
        if any(sign in text for sign in _NO_TOKEN):
            return _about_token()
        for sign, times, reason in _HOPELESS:
            if text.count(sign) >= times:
                return reason
        if passed > _TELL_AFTER_S and not told:
            say(f"waiting up to {limit_s:.0f} s to join the Ray cluster at '{address}'")
            told = True
    return (
        f"it took more than {limit_s:.0f} s: check the cluster with 'ray status', or raise "
        "actors.start_timeout_s"
    )


def _reason(told: str, log: str) -> str:
    """Ray's error, or else the last line of its log, and the remedy if it is known."""
    if any(sign in told + log for sign in _NO_TOKEN):
        return _about_token()
    try:
        name, message = json.loads(told.splitlines()[-1])
        first = next(iter(message.strip().splitlines()), "")
        reason = f"{first} ({name})" if first else name
    except (ValueError, IndexError):
        lines = [line for line in log.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else "Ray ended without a message"
    for sign, remedy in _SIGNS.items():
        if sign in (told + log).lower():
            return f"{reason}: {remedy}"
    return reason


def _about_token() -> str:
    """A sentence naming the source of the refused token, and the remedy."""
    mode, path = os.environ.get("RAY_AUTH_MODE", "token"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    usual = os.path.expanduser(_USUAL_TOKEN)
    if mode.lower() != "token":
        return (
            f"it requires a token, and RAY_AUTH_MODE={mode} sends none: set "
            f"RAY_AUTH_MODE=token, and the cluster's own token in RAY_AUTH_TOKEN or {_USUAL_TOKEN}"
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        refused = "in RAY_AUTH_TOKEN"
    elif path:
        refused = f"in '{path}', which RAY_AUTH_TOKEN_PATH names"
    elif os.path.exists(usual):
        refused = f"in '{usual}'"
    else:
        return (
            "it requires a token, and there is none here: set RAY_AUTH_MODE=token, and the "
            f"cluster's own token in RAY_AUTH_TOKEN or {_USUAL_TOKEN}"
        )
    return (
        f"it refuses the token {refused}: put the cluster's own token there, which is in the "
        f"head node's RAY_AUTH_TOKEN or {_USUAL_TOKEN}"
        + ("" if "RAY_AUTH_MODE" in os.environ else ", and set RAY_AUTH_MODE=token")
    )


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
