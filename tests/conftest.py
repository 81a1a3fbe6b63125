"""What the tests share: a cache of their own, tiny models, one thread, no network."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Two processes of tests share the cores: as in lmcot's own processes, threads that wait for each
# other spin only briefly. The OpenMP runtime reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A name that is no model's would be looked for on the Hub, for a minute where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Machines are noisy: how long an example takes proves nothing.
settings.register_profile("lmcot", deadline=None)
settings.load_profile("lmcot")

TinyModel = Callable[[str], tuple[Any, Any]]


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of converted and random models: the caller's if set, else the session's own."""
    given = os.environ.get("LMCOT_CACHE")
    if given:
        yield Path(given)
        return
    own = tmp_path_factory.mktemp("lmcot-cache")
    if "PYTEST_XDIST_WORKER" in os.environ:  # so that one process converts SmolLM2, not each
        shared = tmp_path_factory.getbasetemp().parent / "lmcot-models"
        shared.mkdir(exist_ok=True)
        (own / "models").symlink_to(shared)
    os.environ["LMCOT_CACHE"] = str(own)
    yield own
    del os.environ["LMCOT_CACHE"]


@pytest.fixture(scope="session", autouse=True)
def ray_folder() -> Iterator[None]:
    """Ray's logs and sockets go into a folder that is gone at the end."""
    # Not below pytest's: the path of a Unix socket has room for 107 characters.
    folder = tempfile.mkdtemp(prefix="lmcot-ray-")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.pop("RAY_TMPDIR")
    if before is not None:
        os.environ["RAY_TMPDIR"] = before


@pytest.fixture(scope="session")
def tiny(model_cache: Path) -> TinyModel:
    """Loads ``random:KIND`` in float32, once a session: copy it before you change it."""
    from lmcot.models.sources import load_model

    return functools.cache(lambda kind: load_model(f"random:{kind}", "float32"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads only get into each other's way in models this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
