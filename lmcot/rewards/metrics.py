"""Measures of a rationale that need no reference and no model, each in [0, 1].

They are pure functions of text, in the manner of ROSCOE (Golovneva et al. 2022, "ROSCOE: A Suite
of Metrics for Scoring Step-by-Step Reasoning"): a rationale's sentences are the steps h_i, and a
step is scored by how well it aligns with what should support it. ROSCOE aligns by the cosine of
sentence embeddings, ``(1 + cos) / 2``. Here words are aligned, because on human labels that
separated supported from unsupported rationales better (docs/rewards.md) and it needs no model.
ROSCOE's own scores are in `lmcot.rewards.roscoe`.

Content words are lower-cased words and numbers without function words. They are counted with
their repetitions (``|H|`` is the number of words, ``A ∩ B`` takes the smaller count of each, as in
BLEU's clipped precision, Papineni et al. 2002), so that saying a word twice earns nothing. A
rationale without words scores 0.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from statistics import fmean

from lmcot.records import Example, Paragraph
from lmcot.text.content import content_words, words_of
from lmcot.text.sentences import split_sentences


def factuality(example: Example, rationale: str) -> float:
    """Support: how much of each sentence a single passage of the context holds, on average.

    ``mean_i max_j |H_i ∩ S_j| / |H_i|``, H_i the content words of the rationale's sentences and
    S_j those of the passages, titles included. This is ROSCOE's Faithfulness-Step with clipped
    word precision in place of the cosine, and passages as the source's parts: a sentence may
    combine several sentences of one passage, but not several passages.
    """
    passages = [content_words(_passage(paragraph)) for paragraph in example.context]
    steps = _steps(rationale)
    if not steps or not passages:
        return 0.0
    return fmean(max(_common(step, p) for p in passages) / step.total() for step in steps)


def relevance(example: Example, rationale: str) -> float:
    """Aboutness: how far rationale and question are about the same things.

    ``2 |Q ∩ R| / (|Q| + |R|)``, Q and R the content words of question and whole rationale; 0 for
    a question without any. The harmonic mean of both directions of alignment, where ROSCOE's
    Informativeness-Step takes the arithmetic one (of cosines, and with the context): much that
    the question does not ask for then weighs as heavily as leaving out what it does. Values of
    good rationales lie around one half, for they must say new things as well.
    """
    asked, said = content_words(example.question), content_words(rationale)
    return 2 * _common(asked, said) / (asked.total() + said.total()) if said else 0.0


def coherence(example: Example, rationale: str) -> float:
    """Linking: how much of each sentence ties up with the question or an earlier one, on average.

    ``mean_i max_{E before H_i} |H_i ∩ E| / min(|H_i|, |E|)`` (the overlap coefficient); the
    question comes before the first sentence. A sentence of the same content words as an earlier
    one, or as the question, adds nothing and counts 0: what ROSCOE's Repetition-Step,
    ``(1 - max cos(h_i, h_j)) / 2``, is after. ROSCOE has no score of links between steps.
    """
    steps = _steps(rationale)
    before = [words for words in [content_words(example.question)] if words]
    links = [_link(step, [*before, *steps[:number]]) for number, step in enumerate(steps)]
    return fmean(links) if links else 0.0


def naturalness(example: Example, rationale: str) -> float:
    """Absence of repetition: ``prod_{n=2..4} distinct n-grams / n-grams`` of the words.

    The "diversity" of Su et al. 2022 (A Contrastive Framework for Neural Text Generation); it
    stands for ROSCOE's Repetition-Token.
    """
    del example
    words = words_of(rationale)
    return math.prod(_distinct_share(words, n) for n in (2, 3, 4)) if words else 0.0


def readability(example: Example, rationale: str) -> float:
    """Flesch's reading ease (Flesch 1948), divided by 100 and clipped to [0, 1].

    ``206.835 - 1.015 words/sentences - 84.6 syllables/words``; syllables are estimated.
    """
    del example
    words = words_of(rationale)
    if not words:
        return 0.0
    sentences = max(1, len(split_sentences(rationale)))
    syllables = sum(map(_syllables, words))
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(1.0, max(0.0, ease / 100))


TEXT_METRICS: dict[str, Callable[[Example, str], float]] = {
    "factuality": factuality,
    "relevance": relevance,
    "coherence": coherence,
    "naturalness": naturalness,
    "readability": readability,
}
"""The metric of each aspect that is measured from the text alone."""


def _steps(rationale: str) -> list[Counter[str]]:
    """The content words of each sentence that has any."""
    return [words for words in map(content_words, split_sentences(rationale)) if words]


def _passage(paragraph: Paragraph) -> str:
    return " ".join([paragraph.title, *paragraph.sentences])


def _common(words: Counter[str], others: Counter[str]) -> int:
    """``|A ∩ B|``, summed directly because ``&`` would build a counter each time."""
    return sum(min(count, others[word]) for word, count in words.items() if word in others)


def _link(step: Counter[str], earlier: list[Counter[str]]) -> float:
    if any(step.keys() == others.keys() for others in earlier):
        return 0.0
    ties = (_common(step, others) / min(step.total(), others.total()) for others in earlier)
    return max(ties, default=1.0)


def _distinct_share(words: list[str], n: int) -> float:
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def _syllables(word: str) -> int:
    """Number of vowel groups, without a silent final e; each digit counts as one."""
    if word.isdigit():
        return len(word)
    plain = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    groups = len(re.findall(r"[aeiouy]+", plain))
    silent = plain.endswith("e") and not plain.endswith("le") and groups > 1
    return max(1, groups - silent)
