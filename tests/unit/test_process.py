"""A program that imports lmcot stays as it is; lmcot's own processes are prepared."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

IMPORTING = """
import json, os, warnings
import deepspeed.accelerator, ray, transformers, peft
from transformers import utils

def state():
    return [dict(os.environ), [str(one) for one in warnings.filters],
            str(utils.is_sklearn_available), str(utils.is_scipy_available)]

before = state()
from lmcot import Guide
import lmcot.models.sources, lmcot.models.generation.engine, lmcot.learner.engine, lmcot.actors.base
print(json.dumps([before, state()]))
"""
PREPARING = """
import json, os, sys
from lmcot.process import prepare
os.environ.pop("GOMP_SPINCOUNT", None)
os.environ["LRU_CACHE_CAPACITY"] = "5"
prepare()
first = "torch" in sys.modules
import lmcot.learner.engine, lmcot.models.sources
import transformers.generation.candidate_generator
from deepspeed.accelerator import get_accelerator
kept = {name: os.environ.get(name) for name in
        ("GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY", "DS_ACCELERATOR")}
print(json.dumps([first, kept, get_accelerator().device_name(),
                  [name for name in ("sklearn", "scipy", "pandas") if name in sys.modules]]))
"""


def printed(code: str) -> Any:
    """What a fresh process prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_guide_is_imported_without_ray_a_web_framework_or_torch() -> None:
    heavy = ["ray", "fastapi", "starlette", "deepspeed", "torch"]
    found = f"[name for name in {heavy} if name in sys.modules]"
    assert printed(f"import sys, json; from lmcot import Guide; print(json.dumps({found}))") == []


def test_importing_changes_nothing_in_a_users_process() -> None:
    """Neither variables, nor filters of warnings, nor what transformers finds installed."""
    before, after = printed(IMPORTING)
    assert before[0] == after[0]
    assert before[1:] == after[1:]


def test_a_prepared_process_spins_briefly_and_imports_less() -> None:
    torch_first, variables, device, imported = printed(PREPARING)
    assert not torch_first, "the OpenMP runtime reads its variable when torch is imported"
    assert variables == {
        "GOMP_SPINCOUNT": "1000",
        "LRU_CACHE_CAPACITY": "5",  # what the user has set stays
        "DS_ACCELERATOR": None,
    }
    assert device in ("cpu", "cuda")
    assert imported == []
