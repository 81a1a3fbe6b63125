"""PPO learns a task whose optimum is known, for both architectures; so does GRPO."""

from __future__ import annotations

import pytest

from benchmarks.toy import MODELS, learn, toy_config
from examples.one_process import SOLVED
from lmcot.process import use_threads

LLAMA, T5 = MODELS


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("model", "estimator", "staleness"),
    [
        (LLAMA, "gae, value head", 0),
        (T5, "gae, value head", 0),
        (LLAMA, "grpo", 0),
        (LLAMA, "gae, value head", 2),
    ],
)
def test_the_toy_is_learned(model: str, estimator: str, staleness: int) -> None:
    """[30] A random tiny model reaches 95% of the known optimum within the steps it has.

    So it does from batches that a policy two steps older sampled.

    In one process, to test the learner alone; `make toy` does the same with all actors. Three
    seeds and the other estimators are in `benchmarks/toy.py`.
    """
    use_threads(threads=1)
    outcome = learn(toy_config(model, estimator, staleness=staleness))
    first, steps = outcome.rewards[0], len(outcome.rewards)
    print(f"{model}: {first:.2f} -> {outcome.last:.2f}, {steps} steps, {outcome.seconds:.0f} s")
    assert first < 0.5, "the task is solved before it is learned"
    assert outcome.last > SOLVED
