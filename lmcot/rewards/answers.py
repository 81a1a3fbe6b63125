"""Answers: how they are compared with the gold answer, and how they are read out of text.

Comparison is that of HotpotQA's official evaluation (Yang et al. 2018): answers are normalised,
then compared whole (exact match) or as bags of words (F1).
"""

from __future__ import annotations

import re
import string
from collections import Counter

from lmcot.rewards.sentences import split_sentences

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED_ANSWERS = ("yes", "no", "noanswer")

_MARKUP = re.compile(r"\*\*|__|`|</?answer>|\\boxed\{([^{}]*)\}", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"\banswer(?:\s+(?:to|for)\s+(?:the|this|that|your)\s+question)?"
    r"(?:\s+(?:is|was|would\s+be|must\s+be|should\s+be)\b\s*[:\-\u2013\u2014]?|\s*[:=])\s*",
    re.IGNORECASE,
)
# A base model goes on with a question of its own.
_NEXT_QUESTION = re.compile(
    r"(?<=\S)\s*\n\s*(?:question|context|q)\s*:.*", re.IGNORECASE | re.DOTALL
)
_LABEL = re.compile(r"(?:A|Ans)\s*:\s*")
_REASON = re.compile(r"(?<=\S),?\s+because\b.*", re.IGNORECASE | re.DOTALL)
_CLOSED_SENTENCE = re.compile(r"(yes|no)\s*[,;:\u2013\u2014-]\s*(.+)", re.IGNORECASE)
_VERB = re.compile(
    r"\b(?:is|are|was|were|isn't|aren't|wasn't|weren't|do|does|did|has|have|had|can)\b"
)
_WRAPPING = " \t\"'\u201c\u201d\u2018\u2019`*_<>,;:"


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, words parted by one space."""
    unpunctuated = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", unpunctuated).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if both are the same once normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1(prediction: str, gold: str) -> float:
    """F1 between the words (with multiplicity) of both, normalised; in [0, 1].

    A ``yes``, ``no`` or ``noanswer`` on either side must be matched whole.
    """
    predicted, wanted = normalize_answer(prediction), normalize_answer(gold)
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
    wanted = normalize_answer(gold)
    return float(bool(wanted) and f" {wanted} " in f" {normalize_answer(prediction)} ")


def contains_gold(rationale: str, gold: str) -> bool:
    """Whether a rationale holds the gold answer.

    The bare words "yes" and "no" say nothing within a text: for them, the answer that the
    rationale concludes with counts.
    """
    if normalize_answer(gold) in _CLOSED_ANSWERS:
        return exact_match(concluded_answer(rationale), gold) == 1.0
    return inclusion(rationale, gold) == 1.0


def extract_answer(text: str) -> str:
    """The short answer in a completion of the frozen LM; empty if the completion is.

    It is what follows "the answer is" or "Answer:" where that is said, else the first sentence
    of the first line, without markup, quotes and final stop; "Yes, both are." is "Yes".
    """
    concluded = concluded_answer(text)
    if concluded:
        return concluded
    return _short_form(_LABEL.sub("", _plain(text).strip(), count=1))


def concluded_answer(rationale: str) -> str:
    """The answer that a text states itself, for example "So the answer is X."; empty if none.

    Of several conclusions the last that says something counts; what follows on a new question
    ("Question: ...") does not.
    """
    parts = _CONCLUSION.split(_plain(rationale))
    answers = (_short_form(_REASON.sub("", part)) for part in reversed(parts[1:]))
    return next((answer for answer in answers if answer), "")


def _plain(text: str) -> str:
    return _NEXT_QUESTION.sub("", _MARKUP.sub(r"\1", text))


def _short_form(text: str) -> str:
    sentences = split_sentences(text)
    if not sentences:
        return ""
    answer = sentences[0].strip(_WRAPPING).rstrip(".!?" + _WRAPPING)
    closed = _CLOSED_SENTENCE.fullmatch(answer)
    # "No, No, Nanette" is a title: only a sentence's yes or no stands for itself.
    if closed and (closed[2][0].islower() or _VERB.search(closed[2])):
        return closed[1]
    return answer
