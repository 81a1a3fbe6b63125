"""PPO learns a task whose optimum is known, for both architectures."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmcot.actors.base import prepare_process
from lmcot.config import Config, load_config
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode
from lmcot.data.sampler import sample_seed
from lmcot.learner.session import LearnerSession
from lmcot.models.generation import generate_unit
from lmcot.models.sources import eos_ids, load_tokenizer
from lmcot.records import Rollout, ScoredRollout
from lmcot.rewards.combine import increasing_reward, judge_increasing

CONFIG = Path(__file__).parents[2] / "configs" / "toy.yaml"


@pytest.mark.e2e
@pytest.mark.parametrize("model", ["random:counting-llama", "random:counting-t5"])
def test_ppo_learns_to_count_upwards(model: str) -> None:
    """[30] A random tiny model reaches 95% of the known optimum in under 40 seconds of one CPU.

    In one process, to test the learner alone; `make toy` does the same with all actors.
    """
    prepare_process(threads=1)
    config = load_config(CONFIG, [f"policy.source={model}"])
    tokenizer = load_tokenizer(model)
    session = LearnerSession(config, "refine", model, config.refine.steps)
    examples = load_examples(config.data.train).examples[: config.refine.prompts_per_step]
    templates = load_templates(config.prompts.templates)
    prompts = [encode(templates.rationale(example), tokenizer) for example in examples]
    started = time.process_time()  # of this process: what else the machine does is left out
    rewards: list[float] = []
    for step in range(config.refine.steps):
        scored = _sample(session.policy.lm, tokenizer, prompts, config, step)
        rewards.append(statistics.fmean(one.reward for one in scored))
        if len(rewards) > 5 and statistics.fmean(rewards[-5:]) > 0.95:
            break
        session.ppo.step(scored, step)
    seconds = time.process_time() - started
    print(f"{model}: {rewards[0]:.2f} -> {rewards[-1]:.2f}, {len(rewards)} steps, {seconds:.0f} s")
    assert rewards[0] < 0.5, "the task is solved before it is learned"
    assert statistics.fmean(rewards[-5:]) > 0.95
    assert seconds < 40


def _sample(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: Config,
    step: int,
) -> list[ScoredRollout]:
    """One step's rationales with the toy's rewards."""
    rows = [(p, k) for p in range(len(prompts)) for k in range(config.refine.samples_per_prompt)]
    generated = generate_unit(
        lm,
        [prompts[p] for p, _ in rows],
        seeds=[sample_seed(config.seed, step, p, k) for p, k in rows],
        max_new_tokens=config.policy.max_new_tokens,
        temperature=config.policy.temperature,
        eos_ids=eos_ids(lm, tokenizer),
        pad_id=tokenizer.pad_token_id,
    )
    rollouts = [
        Rollout(
            unit_id=str(step),
            example_id=str(p),
            sample=k,
            prompt_ids=tuple(prompts[p]),
            response_ids=one.response_ids,
            logprobs=one.logprobs,
            finish_reason="eos" if one.finish_reason == "eos" else "length",
            text=tokenizer.decode(one.response_ids, skip_special_tokens=True),
            policy_version=step,
        )
        for (p, k), one in zip(rows, generated, strict=True)
    ]
    assert config.rewards.kind == "increasing"
    judgements = judge_increasing(rollouts, config.rewards)
    length = config.rewards.length
    return [
        ScoredRollout(rollout, judgement, increasing_reward(rollout.text, length))
        for rollout, judgement in zip(rollouts, judgements, strict=True)
    ]
