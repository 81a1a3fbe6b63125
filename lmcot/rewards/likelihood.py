"""The gain in the gold answer's likelihood that a rationale brings, by the frozen LM."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmcot.records import Example, Failure, Score
from lmcot.rewards.component import Context, Measured


def likelihood_gains(
    examples: Sequence[Example], rationales: Sequence[str], context: Context
) -> list[Measured]:
    """``P(gold | question, rationale) - P(gold | question)``, each given the context too unless the
    frozen LM reads no passages, or the failure.

    In [-1, 1], for each rationale and the example it belongs to. ``P`` is
    ``exp(log-likelihood / tokens)`` of the gold answer, in the form of the templates' replies,
    after the guided and the standard prompt (without passages: after the prompt with the rationale
    and with an empty one): the geometric mean of its tokens' probabilities. The
    gain is that of Rainier (Liu et al. 2022), whose ``P`` is shared out among given choices;
    questions about a text come without choices. The length is divided out: without that, every
    long answer would have a probability, and a gain, near 0.

    The prompt without the rationale is asked once for all rationales of an example.
    """
    templates, kind = context.templates, context.kind
    guided = [
        templates.guided(example, rationale, kind)
        for example, rationale in zip(examples, rationales, strict=True)
    ]
    distinct = list(dict.fromkeys(examples))
    if kind == "rationale_only":
        unguided = [templates.guided(example, "", kind) for example in distinct]
    else:
        unguided = [templates.standard(example) for example in distinct]
    template = templates.for_frozen(kind)
    before = template if kind == "rationale_only" else templates.file.standard
    scores = context.frozen.score(
        [*unguided, *guided],
        [
            *(templates.reply(before, example) for example in distinct),
            *(templates.reply(template, example) for example in examples),
        ],
    )
    without = dict(zip(distinct, scores, strict=False))
    with_rationale = scores[len(distinct) :]
    return [
        _gain(without[example], score)
        for example, score in zip(examples, with_rationale, strict=True)
    ]


def _gain(without: Score | Failure, with_rationale: Score | Failure) -> Measured:
    if isinstance(without, Failure):
        return without
    if isinstance(with_rationale, Failure):
        return with_rationale
    return _probability(with_rationale) - _probability(without)


def _probability(score: Score) -> float:
    return math.exp(score.logprob / max(1, score.tokens))
