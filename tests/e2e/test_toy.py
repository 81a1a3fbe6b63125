"""PPO learns a task whose optimum is known, for both architectures."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from lmcot.actors.units import RolloutPrompt, RolloutUnit
from lmcot.config import load_config
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode
from lmcot.learner.session import LearnerSession
from lmcot.models.generation import generate_unit
from lmcot.models.sources import eos_ids, load_tokenizer
from lmcot.records import Rollout, ScoredRollout
from lmcot.rewards.combine import judge_increasing, scalar_reward

CONFIG = Path(__file__).parents[2] / "configs" / "toy.yaml"


@pytest.mark.e2e
@pytest.mark.parametrize("model", ["random:counting-llama", "random:counting-t5"])
def test_ppo_learns_to_count_upwards(model: str) -> None:
    """[30] A random tiny model reaches 95% of the known optimum in under 40 seconds.

    In one process, to test the learner alone; `make toy` does the same with all actors.
    """
    config = load_config(CONFIG, [f"policy.source={model}"])
    settings, policy = config.refine, config.policy
    tokenizer = load_tokenizer(model)
    session = LearnerSession(config, "refine", model, settings.steps)
    examples = load_examples(config.data.train).examples[: settings.prompts_per_step]
    templates = load_templates(config.prompts.templates)
    prompts = tuple(
        RolloutPrompt(e.id, tuple(encode(templates.rationale(e), tokenizer))) for e in examples
    )
    started = time.monotonic()
    rewards = []
    for step in range(settings.steps):
        unit = RolloutUnit(
            unit_id=str(step), prompts=prompts, samples=settings.samples_per_prompt,
            temperature=policy.temperature, max_new_tokens=policy.max_new_tokens,
            seed=config.seed, step=step, policy_version=step,
        )  # fmt: skip
        scored = _sample_and_judge(session, unit, config)
        rewards.append(statistics.fmean(one.reward for one in scored))
        session.ppo.step(scored, step)
    seconds = time.monotonic() - started
    print(f"{model}: {rewards[0]:.2f} -> {rewards[-1]:.2f} in {seconds:.0f} s")
    assert rewards[0] < 0.6, "the task is solved before it is learned"
    assert statistics.fmean(rewards[-5:]) > 0.95
    assert seconds < 40


def _sample_and_judge(session, unit, config):  # type: ignore[no-untyped-def]
    rows = [(p, k) for p in unit.prompts for k in range(unit.samples)]
    tokenizer = session._tokenizer
    generated = generate_unit(
        session.policy.lm,
        [p.prompt_ids for p, _ in rows],
        seeds=[unit.sample_seed(p.example_id, k) for p, k in rows],
        max_new_tokens=unit.max_new_tokens,
        temperature=unit.temperature,
        eos_ids=eos_ids(session.policy.lm, tokenizer),
        pad_id=tokenizer.pad_token_id,
    )
    rollouts = [
        Rollout(
            unit.unit_id, p.example_id, k, p.prompt_ids, one.response_ids, one.logprobs,
            "eos" if one.finish_reason == "eos" else "length",
            tokenizer.decode(one.response_ids, skip_special_tokens=True), unit.policy_version,
        )
        for (p, k), one in zip(rows, generated, strict=True)
    ]  # fmt: skip
    judgements = judge_increasing(rollouts, config.rewards)
    return [
        ScoredRollout(r, j, scalar_reward(j, config.rewards))
        for r, j in zip(rollouts, judgements, strict=True)
    ]
