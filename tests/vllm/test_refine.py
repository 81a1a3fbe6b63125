"""PPO with models on vLLM, with real actors, some of which are killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lmcot.errors import UserError
from tests.integration.runtime_cases import Killer, assert_counted_once, kill, run, told
from tests.vllm.conftest import make_model

VLLM = "rollout={engine: vllm, cache_gib: 0.05, units_at_once: 4}"
STEPS, QUESTIONS = 30, 32


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is to learn the toy task."""
    folder = tmp_path_factory.mktemp("counting") / "model"
    return make_model(folder, kind="counting-llama", spread=0.02)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("engine", [VLLM, "rollout.engine=transformers"], ids=["vllm", "own"])
def test_the_toy_is_learned_though_the_sampler_is_killed(
    tmp_path: Path, counting: str, engine: str
) -> None:
    """By both engines alike. The units that an actor on vLLM had in flight are done again, once."""
    killer = Killer({10: kill("RolloutActor")} if engine == VLLM else {}, seed=0)
    run(
        tmp_path / "run", f"policy.source={counting}", engine, f"refine.steps={STEPS}",
        f"refine.prompts_per_step={QUESTIONS}", "actors.prompts_per_unit=8", "refine.epochs=2",
        "actors.rollout.count=1", "actors.colocate=true", "actors.verify_weights=true",
        "checkpoints.every=30",
        on_step=killer.on_step,
    )  # fmt: skip
    killer.finish()
    assert_counted_once(tmp_path / "run", STEPS, [QUESTIONS] * STEPS)
    rewards = told(tmp_path / "run", "reward/mean")
    print(f"{engine}: {[round(reward, 2) for reward in rewards]}")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert max(told(tmp_path / "run", "sampler/gap")) < 1e-3
    restarts = told(tmp_path / "run", "health/actor_restarts")[-1]
    assert restarts == (engine == VLLM)


@pytest.mark.usefixtures("cluster")
def test_a_killed_frozen_lm_on_vllm_is_a_lost_actor(tmp_path: Path, counting: str) -> None:
    """With both models on vLLM."""
    killer = Killer({1: kill("FrozenActor")}, seed=0)
    run(
        tmp_path / "run", f"policy.source={counting}", VLLM, "refine.steps=3",
        f"frozen={{backend: vllm, source: {counting}, dtype: float32, cache_gib: 0.05, "
        "max_answer_tokens: 4, cache: {enabled: false}}",
        "rewards={kind: guidance}", "actors.rollout.count=1",
        on_step=killer.on_step,
    )  # fmt: skip
    killer.finish()
    assert_counted_once(tmp_path / "run", 3)
    assert told(tmp_path / "run", "batch/judged_share") == [1.0] * 3


def test_an_encoder_decoder_policy_is_refused_before_anything_starts(tmp_path: Path) -> None:
    said = "rollout.engine is 'vllm', but policy.source 'random:counting-t5' is an encoder-decoder"
    with pytest.raises(UserError, match=said):
        run(tmp_path, "policy.source=random:counting-t5", "rollout.engine=vllm")
