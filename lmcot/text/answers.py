"""How answers are compared with the right ones.

Comparison is that of HotpotQA's official evaluation (Yang et al. 2018): answers are normalised,
then compared whole (exact match) or as bags of words (F1). It differs in answers of which the
normalisation leaves nothing ("A", "The The", "?"): they are compared in the form that is left
before articles, or punctuation, are taken out; and no answer at all matches nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from lmcot.text.reading import concluded_answer, extract_answer

__all__ = [
    "best",
    "concluded_answer",
    "contains_gold",
    "exact_match",
    "extract_answer",
    "f1",
    "inclusion",
    "normalize_answer",
]

Metric = Callable[[str, str], float]

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED_ANSWERS = ("yes", "no", "noanswer")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, words with one space between them.

    Where nothing is left of it, articles stay; where nothing is left then, punctuation does.
    """
    return next((form for form in _forms(text) if form), "")


def _forms(text: str) -> tuple[str, str, str]:
    """The text without punctuation and articles, without punctuation, and with all of it."""
    lower = text.lower()
    worded = lower.translate(_WITHOUT_PUNCTUATION)
    bare = _ARTICLES.sub(" ", worded)
    return _spaced(bare), _spaced(worded), _spaced(lower)


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _compared(prediction: str, gold: str) -> tuple[str, str]:
    """Both in the form that leaves something of the gold answer."""
    forms = _forms(gold)
    level = next((at for at, form in enumerate(forms) if form), 0)
    return _forms(prediction)[level] or normalize_answer(prediction), forms[level]


def exact_match(prediction: str, gold: str) -> float:
    """1 if both are the same once normalised, else 0; nothing matches an empty answer."""
    predicted, wanted = _compared(prediction, gold)
    return float(bool(wanted) and predicted == wanted)


def f1(prediction: str, gold: str) -> float:
    """F1 between the words (with multiplicity) of both, normalised; in [0, 1].

    A ``yes``, ``no`` or ``noanswer`` on either side must be matched whole.
    """
    predicted, wanted = _compared(prediction, gold)
    if predicted != wanted and (predicted in _CLOSED_ANSWERS or wanted in _CLOSED_ANSWERS):
        return 0.0
    predicted_words, wanted_words = predicted.split(), wanted.split()
    common = (Counter(predicted_words) & Counter(wanted_words)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted_words), common / len(wanted_words)
    return 2 * precision * recall / (precision + recall)


def inclusion(prediction: str, gold: str) -> float:
    """1 if the words of the gold answer stand together, in order, in the prediction, else 0."""
    predicted, wanted = _compared(prediction, gold)
    return float(bool(wanted) and f" {wanted} " in f" {predicted} ")


def best(metric: Metric, prediction: str, golds: Sequence[str]) -> float:
    """The metric with the right answer that it is highest with, as MuSiQue's evaluation has it."""
    return max(metric(prediction, gold) for gold in golds)


def contains_gold(rationale: str, golds: str | Sequence[str]) -> bool:
    """Whether a rationale holds one of the right answers.

    Some words say nothing within a text: "yes" and "no", an article, the letter of an option. For
    them, the answer that the rationale concludes with counts.
    """
    return any(_contains(rationale, one) for one in ([golds] if isinstance(golds, str) else golds))


def _contains(rationale: str, gold: str) -> bool:
    bare = _forms(gold)[0]
    if bare in ("", *_CLOSED_ANSWERS) or (len(bare) == 1 and bare.isascii() and bare.isalpha()):
        return exact_match(concluded_answer(rationale), gold) == 1.0
    return inclusion(rationale, gold) == 1.0
