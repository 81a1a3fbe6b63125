"""examples/one_process.py runs as its heading says."""

from __future__ import annotations

import pytest

from examples.one_process import CONFIG, is_solved, learn, main
from lmcot.config import load_config

SMALL = ["refine.prompts_per_step=4", "refine.samples_per_prompt=4", "refine.steps=3"]

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")


def test_it_prints_a_reward_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    """The same ones each time; a step changes the policy, and with it what the next one samples."""
    main(SMALL)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    rewards = list(learn(load_config(CONFIG, SMALL)))
    assert len(rewards) == 3
    assert [float(line.split()[3]) for line in lines] == [round(one, 2) for one in rewards]
    still = [*SMALL, "refine.optimiser.learning_rate=1e-12"]
    without = list(learn(load_config(CONFIG, still)))
    assert without[0] == rewards[0]
    assert without[1:] != rewards[1:]


def test_other_rewards_are_refused() -> None:
    """Those of guidance need a frozen LM, which the example does not have."""
    frozen = ["frozen={backend: transformers, source: 'random:llama'}", "rewards={kind: guidance}"]
    with pytest.raises(ValueError, match="the toy's rewards are 'increasing', not 'guidance'"):
        next(learn(load_config(CONFIG, [*SMALL, *frozen])))


def test_five_steps_show_that_it_is_learned() -> None:
    assert not is_solved([1.0] * 5)
    assert not is_solved([1.0] * 5 + [0.7])
    assert is_solved([0.1] + [0.96] * 5)
