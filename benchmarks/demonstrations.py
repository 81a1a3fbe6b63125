"""What demonstrations that differ by question cost a local frozen LM.

    python -m benchmarks.demonstrations [--questions 16] [--count 4] [--repeats 1]

SmolLM2-135M answers the same questions with demonstrations that are the same for all of them
(``stratified``) and with those nearest to each question (``similar``), which share no prefix.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from benchmarks.cases import SMOLLM2, questions
from benchmarks.judging import frozen_lm
from benchmarks.timing import medians
from lmcot.config import (
    ContextSettings,
    DrawnDemonstrations,
    PromptSettings,
    SupportingFactsTeacher,
)
from lmcot.data.context import apply_context
from lmcot.data.demonstrations import SetApart, draw
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import PromptTemplates, reply_sampling
from lmcot.frozen.templates import open_templates
from lmcot.frozen.transformers_backend import TransformersLM
from lmcot.models.sources import load_tokenizer
from lmcot.records import Completion, Example

ANSWER_TOKENS = 12
POOL = 60
RATIONALE_TOKENS = 256
"""Most tokens of a demonstration's rationale."""


def main() -> None:
    """Prints prompt tokens a second with each, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    tokenizer = load_tokenizer(SMOLLM2)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    pool = load_examples(questions(), limit=POOL).examples
    facts = SupportingFactsTeacher(kind="supporting_facts")
    shown = {}
    for choose in ("stratified", "similar"):
        settings = DrawnDemonstrations.model_validate(
            {"kind": "drawn", "count": options.count, "pool": POOL, "choose": choose}
        )
        shown[choose] = draw(settings, pool, {}, facts, RATIONALE_TOKENS, count_tokens).given
    apart = SetApart(shown["similar"])
    asked = load_examples(
        questions(), limit=options.questions, leaves_out=apart.__contains__
    ).examples
    context = ContextSettings(distractors=0, max_tokens=256)
    examples = apply_context(asked, context, count_tokens)
    lm = frozen_lm()
    templates = {
        choose: open_templates(PromptSettings(demonstrations=given))
        for choose, given in shown.items()
    }
    tokens: dict[str, int] = {}

    def answer(choose: str) -> None:
        tokens[choose] = _tokens_read(lm, templates[choose], examples)

    seconds = medians(
        {choose: partial(answer, choose) for choose in templates},
        options.repeats,
    )
    for choose, taken in seconds.items():
        print(
            f"{choose}: {tokens[choose] / len(examples):.0f} tokens a prompt, {taken:.1f} s, "
            f"{tokens[choose] / taken:.0f} prompt tokens a second"
        )
    print(f"similar takes {seconds['similar'] / seconds['stratified']:.1f} times as long")


def _tokens_read(
    lm: TransformersLM, templates: PromptTemplates, examples: Sequence[Example]
) -> int:
    """Tokens of the prompts that the frozen LM answers."""
    sampling = reply_sampling(templates.file.standard, ANSWER_TOKENS)
    replies = lm.generate([templates.standard(example) for example in examples], sampling)
    assert all(isinstance(one, Completion) for one in replies), replies
    return sum(one.tokens_in for one in replies if isinstance(one, Completion))


if __name__ == "__main__":
    main()
