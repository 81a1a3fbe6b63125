"""Prepares a process that is lmcot's own: an actor, or one that runs a command.

Nothing here is done when a module is imported: a user's program that imports lmcot stays as it is.
"""

from __future__ import annotations

import gc
import os
import pwd
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmcot.files import cache_folder, can_write

_COMPILED_KERNELS = 64
"""How many compiled kernels oneDNN keeps, and torch's own cache in front of it.

In bfloat16 on a CPU each shape has kernels of its own, of about 0.8 MB. By default 1024 are kept,
which a process whose batches are all of other lengths fills with what it never uses again; the
layers of a model share some forty in one pass.
"""
_CACHES = {
    "HF_HOME": "huggingface",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
}
"""Variables of libraries that otherwise write below the home folder, and folders for them."""
_ACCELERATOR = "DS_ACCELERATOR"
_prepared = False


def prepare() -> None:
    """Sets what libraries read when they are imported; call it before torch is imported.

    What the user has set in the environment stays.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    # Importing makes a million objects and no garbage, for which Python looks again and again: by
    # default that is a quarter of what an import takes.
    gc.set_threshold(50_000, 20, 20)
    # Threads that wait for each other spin for long by default: two processes of two threads on
    # two cores then hold each other up many times over. Spinning briefly before they sleep, each
    # takes twice as long as alone, and one by itself is as fast as before. The OpenMP runtime
    # reads it when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Read when the first kernel is made.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_COMPILED_KERNELS))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(_COMPILED_KERNELS))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # DeepSpeed calls functions that torch 2.13 renamed, some hundred times a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def use_threads(threads: int) -> None:
    """Prepares this process, fixes its number of threads and quietens the libraries.

    Results to the bit depend on the number of threads. Ray sets OMP_NUM_THREADS to the actor's
    CPUs, which torch would otherwise take up.
    """
    prepare()
    do_without_home()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    spare_imports()
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def as_a_guest() -> Iterator[None]:
    """Has a stage run in a user's process, whose threads and libraries are as before at the end.

    The actors, which compute, are processes of lmcot's own.
    """
    do_without_home()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quiet_libraries():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Has transformers show no bars and only errors, and is as before at the end."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with accelerator_named():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def accelerator_named() -> Iterator[None]:
    """Names the CPU as the accelerator where there is no GPU: DeepSpeed would guess, and say so.

    DeepSpeed reads the variable once, when it is imported; afterwards it is as it was before.
    """
    import torch

    if torch.cuda.is_available() or _ACCELERATOR in os.environ:
        yield
        return
    os.environ[_ACCELERATOR] = "cpu"
    try:
        yield
    finally:
        del os.environ[_ACCELERATOR]


def spare_imports() -> None:
    """Keeps transformers from importing scikit-learn and SciPy, in a prepared process only.

    Where they are installed, transformers imports them (and pandas with them) for speculative
    decoding and object detection, neither of which lmcot does. That would be a quarter of what an
    actor costs to start.
    """
    if not _prepared:
        return
    from transformers import utils

    utils.is_sklearn_available = utils.is_scipy_available = lambda: False


def do_without_home() -> None:
    """Has libraries write into lmcot's cache where the home folder cannot be written.

    It does nothing where it can be. It is for containers and batch systems, whose users often have
    neither a home nor a name.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", f"uid-{os.getuid()}")  # torch asks for a name
    if can_write(Path(os.path.expanduser("~"))) or "LMCOT_CACHE" not in os.environ:
        return
    for variable, folder in _CACHES.items():
        os.environ.setdefault(variable, str(cache_folder() / folder))
