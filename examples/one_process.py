"""PPO in one process: a tiny random model learns to write numbers that increase.

    python examples/one_process.py [KEY=VALUE ...]

There are no actors and no Ray here, but the generation engine, the rewards and the learner are
those of `lmcot refine`. Each step samples rationales, judges them and learns from them, and prints
their mean reward. The best possible is 1; passing 0.95 takes about 45 steps and ten seconds of CPU.
The settings are those of `configs/toy.yaml`; try `'refine.advantage={kind: grpo}'`, or
`policy.source=random:counting-t5` for an encoder-decoder (about 70 steps).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from lmcot.config import Config, IncreasingRewards, load_config
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode
from lmcot.data.sampler import sample_seed
from lmcot.learner.plan import refine_plan
from lmcot.learner.session import LearnerSession
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import Generated, SampleRequest
from lmcot.models.sources import eos_ids, load_tokenizer
from lmcot.records import Failure, Rollout, ScoredRollout
from lmcot.rewards.combine import judge_increasing
from lmcot.rewards.scoring import score

CONFIG = Path(__file__).parents[1] / "configs" / "toy.yaml"
SOLVED = 0.95
"""The task counts as learned once the mean reward of five steps is higher."""


def learn(config: Config) -> Iterator[float]:
    """Runs PPO until the task is solved or ``refine.steps`` are done; gives each mean reward."""
    session = LearnerSession(config, refine_plan(config, config.policy.source, config.refine.steps))
    sampler = Sampler(config, session.policy.lm)
    rewards: list[float] = []
    for step in range(config.refine.steps):
        batch = sampler.judged(step)
        rewards.append(statistics.fmean(one.reward for one in batch))
        yield rewards[-1]
        if is_solved(rewards):
            return
        session.ppo.step(batch, step)
        sampler.engine.weights_changed()


def is_solved(rewards: Sequence[float]) -> bool:
    """Whether the last five mean rewards show that the task is learned."""
    return len(rewards) > 5 and statistics.fmean(rewards[-5:]) > SOLVED


class Sampler:
    """Samples rationales from the policy, and gives each its reward."""

    def __init__(self, config: Config, lm: Any) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(config.policy.source)
        self._ends = eos_ids(lm, self._tokenizer)
        self.engine = GenerationEngine(lm, pad_id=self._tokenizer.pad_token_id)
        examples = load_examples(config.data.train).examples
        templates = load_templates(config.prompts.templates)
        self._prompts = [
            tuple(encode(templates.rationale(example), self._tokenizer)) for example in examples
        ]

    def judged(self, step: int, questions: Sequence[int] = ()) -> list[ScoredRollout]:
        """One step's rationales with their rewards, by default for the first questions."""
        rewards = self._config.rewards
        if not isinstance(rewards, IncreasingRewards):
            raise ValueError(f"the toy's rewards are 'increasing', not '{rewards.kind}'")
        rollouts = self._rollouts(step, questions or range(self._config.refine.prompts_per_step))
        judgements = judge_increasing(rollouts, rewards)
        scored = score(rollouts, judgements, rewards, self._config.policy.max_new_tokens)
        return [one for one in scored if one is not None]

    def _rollouts(self, step: int, questions: Sequence[int]) -> list[Rollout]:
        """``refine.samples_per_prompt`` rationales for each question, each with its own seed."""
        policy, samples = self._config.policy, range(self._config.refine.samples_per_prompt)
        requests = [
            SampleRequest(
                prompt_ids=self._prompts[question],
                seeds=[sample_seed(self._config.seed, step, question, k) for k in samples],
                max_new_tokens=policy.max_new_tokens,
                temperature=policy.temperature,
                eos_ids=self._ends,
            )
            for question in questions
        ]
        rollouts: list[Rollout] = []
        for question, found in zip(questions, self.engine.sample(requests), strict=True):
            if isinstance(found, Failure):
                raise RuntimeError(f"no rationale for question {question}: {found.reason}")
            rollouts.extend(self._rollout(step, question, k, one) for k, one in enumerate(found))
        return rollouts

    def _rollout(self, step: int, question: int, sample: int, one: Generated) -> Rollout:
        return Rollout(
            unit_id=str(step),
            example_id=str(question),
            sample=sample,
            prompt_ids=self._prompts[question],
            response_ids=one.response_ids,
            logprobs=one.logprobs,
            finish_reason="eos" if one.finish_reason == "eos" else "length",
            text=self._tokenizer.decode(one.response_ids, skip_special_tokens=True),
            policy_version=step,
        )


def main(overrides: list[str]) -> None:
    """Prints the mean reward of each step."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for step, reward in enumerate(learn(load_config(CONFIG, overrides))):
        print(f"step {step:3d}  reward {reward:.2f}  {'#' * round(50 * reward)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
