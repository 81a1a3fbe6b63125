"""PPO with both models on vLLM, with real actors, one of which is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcot.errors import UserError
from tests.integration.runtime_cases import Killer, assert_counted_once, kill, run, told
from tests.vllm.conftest import make_model

STEPS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_both_models_run_on_vllm_and_a_killed_engine_is_a_lost_actor(tmp_path: Path) -> None:
    """Nothing is lost or doubled; the learner finds the sampler's log-probabilities its own."""
    model = make_model(tmp_path / "model", kind="counting-llama")
    killer = Killer({2: kill("RolloutActor")}, seed=0)
    run(
        tmp_path / "run", f"policy.source={model}", f"refine.steps={STEPS}",
        "rollout={engine: vllm, cache_gib: 0.05}", "actors.rollout.count=1",
        f"frozen={{backend: vllm, source: {model}, dtype: float32, cache_gib: 0.05, "
        "max_answer_tokens: 4, cache: {enabled: false}}",
        "rewards={kind: guidance}", "actors.verify_weights=true",
        on_step=killer.on_step,
    )  # fmt: skip
    killer.finish()
    assert_counted_once(tmp_path / "run", STEPS)
    assert max(told(tmp_path / "run", "sampler/gap")) < 1e-3
    assert len(set(told(tmp_path / "run", "policy/approx_kl"))) > 1


def test_an_encoder_decoder_policy_is_refused_before_anything_starts(tmp_path: Path) -> None:
    said = "rollout.engine is 'vllm', but policy.source 'random:counting-t5' is an encoder-decoder"
    with pytest.raises(UserError, match=said):
        run(tmp_path, "policy.source=random:counting-t5", "rollout.engine=vllm")
