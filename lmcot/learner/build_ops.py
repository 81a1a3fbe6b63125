"""Compiles DeepSpeed's operators ahead of time: ``python -m lmcot.learner.build_ops``.

DeepSpeed compiles them at first use otherwise, in the middle of a run. Without a GPU that takes
two to six minutes; once they are built, this command only checks them, in seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

CPU_BUILDERS = ("FusedAdamBuilder", "CPUAdamBuilder", "ShareMemCommBuilder")
"""What training on the CPU loads: two Adams and the shared-memory all-reduce."""
GPU_BUILDERS = ("FusedAdamBuilder",)
"""What training on a GPU loads."""


def build_ops() -> None:
    """Compiles the operators that are missing, in parallel, then loads each one to prove it.

    Raises:
        RuntimeError: if an operator does not compile or load.
    """
    builders = _builders()
    started = time.monotonic()
    missing = []
    for builder, op in builders.items():
        folder = _build_folder(op)
        if remove_stale_lock(folder / "lock"):
            print(f"removed the lock that an interrupted build of {op.name} left", flush=True)
        elif (folder / "lock").exists():
            print(f"another process is building {op.name}: waiting for it", flush=True)
        if not (folder / f"{op.name}.so").exists():
            missing.append(builder)
    if missing:
        names = ", ".join(builders[builder].name for builder in missing)
        print(f"compiling {names} (2 to 6 minutes)", flush=True)
        _compile_in_parallel(missing)
    for op in builders.values():
        op.load(verbose=False)
    done = f"compiled in {time.monotonic() - started:.0f} s" if missing else "nothing to compile"
    print(f"DeepSpeed's operators are ready: {done}", flush=True)


def remove_stale_lock(lock: Path) -> bool:
    """Removes a build's lock file if no process holds it open any more; says whether it did.

    torch waits for ever on the lock of a build that was killed. A living build keeps the file
    open, so an open file tells the two apart.
    """
    if not lock.exists() or _is_open(lock):
        return False
    lock.unlink(missing_ok=True)
    return True


def _is_open(path: Path) -> bool:
    wanted = str(path.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == wanted for file in process.open_files()):
                return True
        except psutil.Error:
            continue  # it has ended, or is another user's: then its lock is not in our cache
    return False


def _builders() -> dict[str, Any]:
    """DeepSpeed's op builders for this machine, by class name."""
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    names = GPU_BUILDERS if gpu else CPU_BUILDERS
    return {name: accelerator.create_op_builder(name) for name in names}


def _build_folder(op: Any) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(op.name, verbose=False))


def _compile_in_parallel(builders: list[str]) -> None:
    command = [sys.executable, "-m", "lmcot.learner.build_ops"]
    # One compiler takes up to 1.5 GB: no more of them at once than there are cores to run them.
    jobs = max(1, (os.cpu_count() or 1) // len(builders))
    environment = {"MAX_JOBS": str(jobs), **os.environ}
    processes = {
        builder: subprocess.Popen(
            [*command, builder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for builder in builders
    }
    outputs = {builder: process.communicate()[0] for builder, process in processes.items()}
    failed = [builder for builder, process in processes.items() if process.returncode]
    if failed:
        logs = "\n".join(outputs[builder] for builder in failed)
        raise RuntimeError(f"{logs}\n{', '.join(failed)} failed to compile: is g++ installed?")


def main() -> None:
    """Without arguments: build what is missing. With a builder's name: compile that one."""
    # Without an activated environment, its ninja is not on the PATH.
    bin_folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    if len(sys.argv) > 1:
        _builders()[sys.argv[1]].load(verbose=False)
        return
    try:
        build_ops()
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
