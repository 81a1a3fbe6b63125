"""The frozen LM's probability of the right option, given a rationale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lmcot.records import Example, Failure, FailureKind
from lmcot.rewards.component import Context, Measured


def choice_probabilities(
    examples: Sequence[Example], rationales: Sequence[str], context: Context
) -> list[Measured]:
    """The probability of the right option after the guided prompt, shared out over the question's
    options, or the failure; for each rationale and the example it belongs to.

    It tells rationales apart that lead to equally wrong replies. Questions with the same options
    (the same letters, or yes and no) are asked together.
    """
    task = context.task
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for at, example in enumerate(examples):
        groups[tuple(task.options(example.question))].append(at)
    measured: list[Measured] = [
        Failure(FailureKind.PERMANENT, "the question has no options") for _ in examples
    ]
    for options, places in groups.items():
        if not options:
            continue
        prompts = [
            context.templates.guided(examples[at], rationales[at], context.kind) for at in places
        ]
        for at, found in zip(places, context.frozen.choose(prompts, options), strict=True):
            if isinstance(found, Failure):
                measured[at] = found
                continue
            right = (one for one in options if task.scores(one, examples[at]).em == 1.0)
            measured[at] = sum(found.probabilities[one] for one in right)
    return measured
