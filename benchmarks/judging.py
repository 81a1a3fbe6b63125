"""Judging rationales as the reward actors do, against one request after the other.

    python -m benchmarks.judging [--rationales 64] [--repeats 1]

Each rationale takes an answer of the frozen LM (SmolLM2-135M) and one question for each of the
eight aspects. The goal is 4 times the speed.
"""

from __future__ import annotations

import argparse

from benchmarks.cases import SMOLLM2, questions
from benchmarks.timing import medians
from lmcot.config import (
    ASPECTS,
    AspectSettings,
    ContextSettings,
    GuidanceRewards,
    PromptSettings,
    TransformersFrozen,
)
from lmcot.data.context import apply_context
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates, reply_sampling
from lmcot.frozen.transformers_backend import TransformersLM
from lmcot.records import Example, Failure, Rollout
from lmcot.rewards.judge import RewardModel

SAMPLES = 4
ANSWER_TOKENS = 12


def main() -> None:
    """Prints the ratio of the two times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rationales", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    lm = frozen_lm()
    examples, rollouts = batch(options.rationales)
    judged = {aspect: AspectSettings(source="judge") for aspect in ASPECTS}
    templates = load_templates("default").showing(2)
    model = RewardModel(GuidanceRewards(aspects=judged), lm, templates, ANSWER_TOKENS)
    sampling = reply_sampling(templates.file.guided, ANSWER_TOKENS)

    def together() -> None:
        judgements = model.judge_rollouts(examples, rollouts)
        assert all(one.failure is None for one in judgements)

    def one_by_one() -> None:
        for example, rollout in zip(examples, rollouts, strict=True):
            guided = templates.guided(example, rollout.text)
            assert not isinstance(lm.generate([guided], sampling)[0], Failure)
            for aspect in ASPECTS:
                question = templates.judge(example, rollout.text, aspect)
                assert not isinstance(lm.choose([question], ("yes", "no"))[0], Failure)

    taken = medians(
        {"together": together, "one by one": one_by_one}, options.repeats, warm_up=False
    )
    for name, seconds in taken.items():
        print(f"{options.rationales} rationales {name}: {seconds:.1f} s")
    print(f"together is {taken['one by one'] / taken['together']:.1f} times as fast (goal: 4)")


def frozen_lm() -> TransformersLM:
    settings = TransformersFrozen(
        backend="transformers",
        source=SMOLLM2,
        dtype="float32",
    )
    return TransformersLM.open(settings, PromptSettings())


def batch(number: int) -> tuple[list[Example], list[Rollout]]:
    """Real questions with their gold paragraphs, and rationales of different lengths for each."""
    loaded = load_examples(questions(), limit=-(-number // SAMPLES)).examples
    gold = ContextSettings(distractors=0, max_tokens=256)
    reduced = apply_context(loaded, gold, lambda text: len(text) // 4)
    examples, rollouts = [], []
    for example in reduced:
        words = f"{' '.join(example.gold_sentences())} So the answer is {example.answer}.".split()
        for sample in range(SAMPLES):
            text = " ".join(words[: len(words) - 3 * sample])
            examples.append(example)
            rollouts.append(Rollout("", example.id, sample, (), (), (), "eos", text, 0))
    return examples[:number], rollouts[:number]


if __name__ == "__main__":
    main()
