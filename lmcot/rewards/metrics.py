"""Reference-free measures of a rationale, each in [0, 1]; pure functions of text.

They compare content words: lower-cased words and numbers without function words, each counted
once, so that saying a thing twice earns nothing. An empty rationale scores 0.
"""

from __future__ import annotations

import math
import re
import unicodedata
from statistics import fmean

from lmcot.records import Example
from lmcot.rewards.sentences import split_sentences

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
# What a rationale says about itself ("so the answer is") is no content either.
_FUNCTION_WORD_LIST = """
a an the this that these those some any each every all both either neither such other another
i you he she it we they me him her us them my your his hers its our their theirs who whom whose
which what when where why how there here one ones himself herself itself themselves
am is are was were be been being do does did doing done have has had having will would shall
should can could may might must of in on at by for from to with without into onto over under
about after before between among through during as than then and or but nor not no yes if
because since so also too very only just more most less least same up out off own s t
answer question therefore thus hence first second finally step context according
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


def factuality(example: Example, rationale: str) -> float:
    """Grounding: the share of the rationale's content words that the context holds.

    ``|R ∩ C| / |R|``, R the rationale's content words, C those of the titles and sentences.
    """
    words = content_words(rationale)
    return len(words & _context_words(example)) / len(words) if words else 0.0


def relevance(example: Example, rationale: str) -> float:
    """Coverage: the share of the question's content words that the rationale takes up.

    ``|Q ∩ R| / |Q|``; 1 for a question without content words.
    """
    if not rationale.strip():
        return 0.0
    words = content_words(example.question)
    return len(words & content_words(rationale)) / len(words) if words else 1.0


def coherence(example: Example, rationale: str) -> float:
    """Linking: how much of each sentence's content ties up with an earlier sentence, on average.

    The mean over the sentences after the first of ``max |S ∩ E| / min(|S|, |E|)`` over the earlier
    sentences E (the overlap coefficient). A sentence with the same content as an earlier one moves
    nothing on and counts 0; a single sentence has nothing to tie up and counts 1.
    """
    del example
    sentences = [words for words in map(content_words, split_sentences(rationale)) if words]
    if not sentences:
        return 0.0
    links = [_link(words, sentences[:index]) for index, words in enumerate(sentences) if index]
    return fmean(links) if links else 1.0


def naturalness(example: Example, rationale: str) -> float:
    """Absence of repetition: ``prod_{n=2..4} distinct n-grams / n-grams`` of the words.

    The "diversity" of Su et al. 2022 (A Contrastive Framework for Neural Text Generation).
    """
    del example
    words = _words(rationale)
    return math.prod(_distinct_share(words, n) for n in (2, 3, 4)) if words else 0.0


def readability(example: Example, rationale: str) -> float:
    """Flesch's reading ease (Flesch 1948), divided by 100 and clipped to [0, 1].

    ``206.835 - 1.015 words/sentences - 84.6 syllables/words``; syllables are estimated.
    """
    del example
    words = _words(rationale)
    if not words:
        return 0.0
    sentences = max(1, len(split_sentences(rationale)))
    syllables = sum(map(_syllables, words))
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(1.0, max(0.0, ease / 100))


def content_words(text: str) -> frozenset[str]:
    """The distinct words and numbers of a text that carry content, lower-cased."""
    return frozenset(_words(text)) - _FUNCTION_WORDS


def _words(text: str) -> list[str]:
    words = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    return [re.sub(r"['\u2019]s$", "", word) for word in words]


def _context_words(example: Example) -> frozenset[str]:
    passages = (" ".join([p.title, *p.sentences]) for p in example.context)
    return content_words(" ".join(passages))


def _link(words: frozenset[str], earlier: list[frozenset[str]]) -> float:
    if words in earlier:
        return 0.0
    return max(len(words & others) / min(len(words), len(others)) for others in earlier)


def _distinct_share(words: list[str], n: int) -> float:
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def _syllables(word: str) -> int:
    """Groups of vowels, a silent final e left out; digits count one each."""
    if word.isdigit():
        return len(word)
    plain = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    groups = len(re.findall(r"[aeiouy]+", plain))
    silent = plain.endswith("e") and not plain.endswith("le") and groups > 1
    return max(1, groups - silent)
