"""Does every estimator learn the toy task, on both architectures?

    python -m benchmarks.toy [--seeds 3] [--staleness 0]

The task: write numbers that increase; its optimum is a reward of 1. One process holds sampler and
learner, on one thread, so that the learner alone is seen. Prints for each combination, seed by
seed, after how many steps the mean reward of five steps passed 0.95, and the CPU seconds that it
took; the tests ask it of some of them. With --staleness 1 or more each batch was sampled by a
policy that is so many steps old, as in asynchronous refinement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmcot.actors.base import prepare_process
from lmcot.config import Config, load_config
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.data.render import encode
from lmcot.data.sampler import sample_seed
from lmcot.learner.session import LearnerSession
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import SampleRequest
from lmcot.models.sources import eos_ids, load_tokenizer
from lmcot.records import Failure, Rollout, ScoredRollout
from lmcot.rewards.combine import increasing_reward, judge_increasing

CONFIG = Path(__file__).parents[1] / "configs" / "toy.yaml"
MODELS = ("random:counting-llama", "random:counting-t5")
_CRITIC_MODEL = "{kind: gae, lam: 1.0, value_coefficient: 1.0, critic: {kind: model}}"
ESTIMATORS = {
    "gae, value head": ["refine.advantage={kind: gae, lam: 1.0, value_coefficient: 1.0}"],
    "gae, critic model": [f"refine.advantage={_CRITIC_MODEL}"],
    # Its advantages are not brought to unit variance: the same bonus would outweigh them.
    "rloo": ["refine.advantage={kind: rloo}", "refine.entropy_coefficient=0.01"],
    "grpo": ["refine.advantage={kind: grpo}"],
}
SOLVED = 0.95


@dataclass(frozen=True)
class Outcome:
    """How a run went."""

    rewards: list[float]
    """Mean reward of each step."""
    seconds: float
    """CPU time of this process: what else the machine does is left out."""

    @property
    def last(self) -> float:
        """Mean over the last five steps."""
        return statistics.fmean(self.rewards[-5:])


def toy_config(model: str, estimator: str, seed: int = 0, staleness: int = 0) -> Config:
    """The toy's settings with another model and estimator."""
    overrides = [
        f"policy.source={model}",
        *ESTIMATORS[estimator],
        f"seed={seed}",
        "refine.steps=200",
        f"refine.max_staleness={staleness}",
    ]
    return load_config(CONFIG, overrides)


def learn(config: Config) -> Outcome:
    """Refines until the task is solved, or its steps are done."""
    model = config.policy.source
    tokenizer = load_tokenizer(model)
    session = LearnerSession(config, "refine", model, config.refine.steps)
    examples = load_examples(config.data.train).examples[: config.refine.prompts_per_step]
    templates = load_templates(config.prompts.templates)
    prompts = [encode(templates.rationale(example), tokenizer) for example in examples]
    engine = GenerationEngine(session.policy.lm, pad_id=tokenizer.pad_token_id)
    started = time.process_time()
    rewards: list[float] = []
    waiting: deque[list[ScoredRollout]] = deque()
    for step in range(config.refine.steps):
        while len(waiting) <= config.refine.max_staleness:
            scored = _sample(engine, tokenizer, prompts, config, len(rewards))
            rewards.append(statistics.fmean(one.reward for one in scored))
            waiting.append(scored)
        if len(rewards) > 5 and statistics.fmean(rewards[-5:]) > SOLVED:
            break
        session.ppo.step(waiting.popleft(), step)
        engine.weights_changed()
    return Outcome(rewards, time.process_time() - started)


def _sample(
    engine: GenerationEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: Config,
    step: int,
) -> list[ScoredRollout]:
    """One step's rationales with the toy's rewards."""
    samples = config.refine.samples_per_prompt
    generated = engine.sample(
        [
            SampleRequest(
                prompt_ids=prompt,
                seeds=[sample_seed(config.seed, step, p, k) for k in range(samples)],
                max_new_tokens=config.policy.max_new_tokens,
                temperature=config.policy.temperature,
                eos_ids=eos_ids(engine.model, tokenizer),
            )
            for p, prompt in enumerate(prompts)
        ]
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
        for p, found in enumerate(generated)
        if not isinstance(found, Failure)
        for k, one in enumerate(found)
    ]
    if config.rewards.kind != "increasing":
        raise ValueError(f"the toy's rewards are not '{config.rewards.kind}'")
    judgements = judge_increasing(rollouts, config.rewards)
    length = config.rewards.length
    return [
        ScoredRollout(rollout, judgement, increasing_reward(rollout.text, length))
        for rollout, judgement in zip(rollouts, judgements, strict=True)
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Learn the toy task in every way.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=0)
    options = parser.parse_args()
    prepare_process(threads=1)
    print("| model | estimator | steps | CPU seconds | reward at the end |")
    print("|---|---|---|---|---|", flush=True)
    for model in MODELS:
        for estimator in ESTIMATORS:
            runs = [
                learn(toy_config(model, estimator, seed, options.staleness))
                for seed in range(options.seeds)
            ]
            steps = " ".join(
                str(len(run.rewards)) if run.last > SOLVED else "never" for run in runs
            )
            seconds = " ".join(f"{run.seconds:.0f}" for run in runs)
            ends = " ".join(f"{run.last:.2f}" for run in runs)
            name = model.removeprefix("random:counting-")
            print(f"| {name} | {estimator} | {steps} | {seconds} | {ends} |", flush=True)


if __name__ == "__main__":
    main()
