"""The `lmcot` command in this process, whose Ray cluster it joins."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import dataclass

import torch

from lmcot.cli import main


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stderr: str


def lmcot(*arguments: str) -> Done:
    """Runs it: a process and a cluster of its own would take half a minute of the CPU to start."""
    told = io.StringIO()
    threads = torch.get_num_threads()
    with redirect_stderr(told):
        code = main(arguments)
    torch.set_num_threads(threads)  # of this process, which the command takes for its own
    return Done(code, told.getvalue())
