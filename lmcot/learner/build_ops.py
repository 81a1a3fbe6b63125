"""Compiles DeepSpeed's operators ahead of time: ``python -m lmcot.learner.build_ops``.

DeepSpeed compiles them at first use otherwise, in the middle of a run. Once they are built, this
command only checks them, in seconds.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

CPU_BUILDERS = ("ShareMemCommBuilder",)
"""What training on the CPU loads: the shared-memory all-reduce. Adam is torch's (`engine`)."""
GPU_BUILDERS: tuple[str, ...] = ()
"""What training on a GPU loads: nothing that must be compiled."""
_RELEASE_S = 1.0
"""A build that ends closes its lock file and then removes it: within this time, even on a busy
machine."""
_REMOVED = "removed the lock that an interrupted build of {} left"


def build_ops() -> None:
    """Compiles the operators that are missing, and loads each one to prove it.

    Raises:
        RuntimeError: if an operator does not compile or load.
    """
    started = time.monotonic()
    for op in _ops():
        folder = _build_folder(op)
        if remove_stale_lock(folder / "lock"):
            print(_REMOVED.format(op.name), flush=True)
        elif (folder / "lock").exists():
            print(f"another process is building {op.name}: waiting for it", flush=True)
        elif not (folder / f"{op.name}.so").exists():
            print(f"compiling {op.name} (about a minute)", flush=True)
        op.load(verbose=False)
    seconds = time.monotonic() - started
    print(f"DeepSpeed's operators are ready, after {seconds:.0f} s", flush=True)


def remove_stale_locks() -> None:
    """Removes the locks of killed builds, for which a learner would wait until its time is up."""
    for op in _ops():
        if remove_stale_lock(_build_folder(op) / "lock"):
            print(_REMOVED.format(op.name), flush=True)


def remove_stale_lock(lock: Path) -> bool:
    """Removes a build's lock file if no process holds it open any more; says whether it did.

    torch waits for ever on the lock of a build that was killed. A living build keeps the file
    open, so an open file tells the two apart.
    """
    if not lock.exists():
        return False
    folder = os.open(lock.parent, os.O_RDONLY)
    try:
        # One process looks and removes at a time: of two, the second could remove the lock of a
        # build that began after the first had removed the stale one.
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not _is_left(lock):
            return False
        time.sleep(_RELEASE_S)
        if not _is_left(lock):
            return False
        lock.unlink(missing_ok=True)
        return True
    finally:
        os.close(folder)


def _is_left(lock: Path) -> bool:
    return lock.exists() and not _is_open(lock)


def _is_open(path: Path) -> bool:
    wanted = str(path.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == wanted for file in process.open_files()):
                return True
        except psutil.Error:
            continue  # it has ended, or is another user's: then its lock is not in our cache
    return False


def _ops() -> list[Any]:
    """DeepSpeed's builders of the operators that this machine needs."""
    import torch

    from lmcot.learner.accelerator import get_accelerator

    accelerator = get_accelerator()
    names = GPU_BUILDERS if torch.cuda.is_available() else CPU_BUILDERS
    return [accelerator.create_op_builder(name) for name in names]


def _build_folder(op: Any) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(op.name, verbose=False))


def main() -> None:
    """Builds what is missing; a failure ends with its reason."""
    # Without an activated environment, its ninja is not on the PATH.
    bin_folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    try:
        build_ops()
    except RuntimeError as error:
        sys.exit(f"DeepSpeed's operators did not compile (is g++ installed?): {error}")


if __name__ == "__main__":
    main()
