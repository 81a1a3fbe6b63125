"""Prepares what Ray needs on this machine: a folder for its files, a place for its token, memory.

What the environment names is used where it can be; where it cannot, something else is, and a line
says so. `lmcot doctor` tells the same as findings.
"""

from __future__ import annotations

import os
import resource
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from ray._common.utils import get_default_ray_temp_dir
from ray._private import utils as ray_utils

from lmcot.errors import UserError
from lmcot.files import cache_folder, can_write
from lmcot.monitor.progress import say
from lmcot.process import do_without_home

_SOCKET_PATH_LIMIT = 107
"""Largest length of a Unix socket's path, in bytes."""
_BELOW_RAY_FOLDER = len("/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store.99")
LEAST_OPEN_FILES = 1024
"""Smallest usable limit: each of Ray's own processes needs some hundred."""
_LEAST_OBJECT_STORE, _MOST_OBJECT_STORE = 128 * 2**20, 2**32
_SHARE_OF_MEMORY = 0.3
"""Share of memory that Ray by default gives its object store."""


def ray_folder() -> tuple[str, str]:
    """The folder for Ray's files on this machine, and why it is not the usual one.

    Returns:
        a folder that can be written, with room for the paths of sockets below; and a sentence
        where it is another than the environment names, else an empty text.

    Raises:
        UserError: if there is none.
    """
    asked = os.path.abspath(get_default_ray_temp_dir())
    trouble = _unfit(asked)
    if not trouble:
        return asked, ""
    own = f"ray-{os.getuid()}"
    for folder in ("/tmp/ray", f"/tmp/{own}", f"/var/tmp/{own}"):
        if not _unfit(folder):
            return folder, f"{trouble}: Ray's files go to '{folder}'"
    raise UserError(f"{trouble}: set RAY_TMPDIR to a folder with a short path that can be written")


def _unfit(folder: str) -> str:
    """Why Ray cannot use a folder for its files; empty if it can."""
    variable = next((one for one in ("RAY_TMPDIR", "TMPDIR") if one in os.environ), "")
    named = f"the folder '{folder}'" + (f" (from {variable})" if variable else "")
    most = _SOCKET_PATH_LIMIT - _BELOW_RAY_FOLDER
    if len(os.fsencode(folder)) > most:
        return f"{named} has a path of more than {most} bytes, too long for Ray's sockets below it"
    if not can_write(Path(folder)):
        return f"{named} cannot be written"
    return ""


def object_store_bytes(gib: float | None) -> int:
    """Bytes of memory for Ray's object store on this machine: weights of a few versions.

    Args:
        gib: what the settings ask for; None: a third of the shared memory that is free and Ray's
            usual share of the memory that is available, at most 4 GiB.
    """
    if gib is not None:
        return int(gib * 2**30)
    available = int(_SHARE_OF_MEMORY * available_memory())
    return max(min(_MOST_OBJECT_STORE, free_shared_memory() // 3, available), _LEAST_OBJECT_STORE)


def available_memory() -> int:
    """Available bytes of memory as Ray counts them, within a container's limit."""
    return int(ray_utils.estimate_available_memory())


def free_shared_memory() -> int:
    """Free bytes in /dev/shm; if that is missing, Ray maps files instead."""
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        return 3 * _MOST_OBJECT_STORE
    return stats.f_bavail * stats.f_frsize


def check_open_files() -> None:
    """Checks the limit of open files, which Ray raises as far as it may.

    Raises:
        UserError: if Ray's processes would end for want of files.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most not in (-1, resource.RLIM_INFINITY) and most < LEAST_OPEN_FILES:
        raise UserError(
            f"only {most} open files are allowed here, too few for Ray: raise the limit "
            "(ulimit -Hn 65536)"
        )


def provide_token(*, make: bool = True) -> None:
    """Has Ray keep its token in lmcot's cache if ``~/.ray`` cannot be written.

    Args:
        make: whether to make a token where none is kept. A cluster that is joined has its own
            already, which is in the cache if another process of this user started the cluster.

    Raises:
        UserError: if the cache cannot be written either.
    """
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    usual = Path(os.path.expanduser("~")) / ".ray" / "auth_token"
    if os.access(usual, os.R_OK) or can_write(usual.parent):
        return
    token = cache_folder() / "ray_auth_token"
    if not token.exists():
        if not make:
            return
        _write_secret(token, secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def _write_secret(path: Path, text: str) -> None:
    """Writes a file that only its owner can read; one that is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # made with mode 0600
        file.write(text)
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)


def look_around() -> tuple[str, list[str], list[str]]:
    """The folder for Ray's files, reasons why Ray would not start here, and notices.

    Changes nothing and never raises.
    """
    folder, troubles, notices = get_default_ray_temp_dir(), [], []
    try:
        folder, notice = ray_folder()
        notices += [notice] if notice else []
    except UserError as error:
        troubles.append(str(error))
    try:
        check_open_files()
    except UserError as error:
        troubles.append(str(error))
    try:
        cache = cache_folder()
    except UserError as error:
        troubles.append(str(error))
    else:
        home = Path(os.path.expanduser("~"))
        if not can_write(home):
            notices.append(f"the home folder '{home}' cannot be written: '{cache}' is used instead")
    return folder, troubles, notices


def prepare_machine() -> None:
    """Checks this machine before Ray starts on it, and makes up for what it lacks.

    Raises:
        UserError: about what Ray cannot do without.
    """
    check_open_files()
    do_without_home()
    provide_token()
    if notice := ray_folder()[1]:
        say(notice)
