"""What an actor finds and imports in a process that Ray starts as at a user's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from lmcot.actors.frozen_actor import FrozenActor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.config import PolicySettings, PromptSettings, TransformersFrozen
from tests.support.forked_workers import plain_workers


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with plain_workers():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_its_process_is_prepared_before_it_imports_its_class() -> None:
    def facts(_: RolloutActor) -> tuple[str | None, str | None, bool]:
        variables = (os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_NUM_THREADS"))
        return *variables, "sklearn" in sys.modules

    policy = PolicySettings(source="random:llama")
    actor = ray.remote(RolloutActor).remote(policy, policy.source, PromptSettings(), threads=1)
    assert ray.get(actor.apply.remote(facts), timeout=120) == ("1000", "1", False)


def test_it_imports_only_what_it_needs() -> None:
    """transformers and peft would bring all of them into every process, for seconds."""
    unneeded = {"datasets", "deepspeed", "matplotlib", "pandas", "peft", "scipy", "sklearn"}

    def imported(_: FrozenActor) -> list[str]:
        return sorted(unneeded & sys.modules.keys())

    settings: Any = TransformersFrozen(backend="transformers", source="random:llama")
    actor = ray.remote(FrozenActor).remote(settings, PromptSettings(), threads=1)
    assert ray.get(actor.apply.remote(imported), timeout=120) == []
