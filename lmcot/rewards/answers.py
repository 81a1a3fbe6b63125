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

# Hidden thinking: all up to its end, or what was cut before it came to one.
_THINKING = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*", re.IGNORECASE | re.DOTALL)
# A base model goes on with a question of its own.
_NEXT_QUESTION = re.compile(
    r"(?<=\S)\s*\n[\s*#]*(?:question|context|q)\s*(?:\*\*)?:.*", re.IGNORECASE | re.DOTALL
)
# Forms that a model was trained or told to put its answer into: LaTeX, a tag, JSON.
_FRAME = re.compile(
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"
    r"|<answer>(.*?)</answer>"
    r"|[\"'](?:\w+[_ ])?answer[\"']\s*:\s*"
    r"(?:\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'|([^\s,}\]]+))",
    re.IGNORECASE | re.DOTALL,
)
_MARKUP = re.compile(
    r"\*\*|__|`|</?answer>|\\(?:boxed|text(?:bf|it|rm)?|mathrm)\{|\\(?=[\"'])", re.IGNORECASE
)
_CONCLUSION = re.compile(
    r"\banswer(?:\s+(?:to|for)\s+(?:the|this|that|your)\s+question)?"
    r"(?:\s+(?:is|was|would\s+be|must\s+be|should\s+be)\b"
    # That says where the answer stands, or that it does not, and not what it is.
    r"(?!\s+(?:not\s+)?(?:explicitly\s+|directly\s+)?"
    r"(?:found|given|stated|mentioned|provided|specified|in\s+the\s+(?:context|text|passage))\b)"
    r"\s*[:\-\u2013\u2014]?|\s*[:=])\s*"
    # A line "Answer - X", or a heading "Answer" above it.
    r"|^[ \t#]*(?:the[ \t]+)?(?:(?:final|short|correct)[ \t]+)?answer"
    r"(?:[ \t]+[-\u2013\u2014][ \t]+|[ \t]*$\s*)",
    re.IGNORECASE | re.MULTILINE,
)
_EXPLANATION = re.compile(
    r"(?<=\S)\s+(?:explanation|justification|note)\s*:.*", re.IGNORECASE | re.DOTALL
)
# Lines that hold no answer: a label alone, or the question once more.
_EMPTY_LINE = re.compile(
    r"^[ \t#]*(?:(?:answer|reasoning|context)[ \t]*:[ \t]*|(?:question|q)[ \t]*:.*)$",
    re.IGNORECASE | re.MULTILINE,
)
# A bullet, or the label of a shortened "Answer:".
_LABEL = re.compile(r"\s*(?:[-\u2022][ \t]+)?(?:(?:A|Ans)[ \t]*:[ \t]*)?")
# What comes before an answer and says nothing of it.
_SOURCE = r"the (?:[a-z]+ )?(?:context|reasoning|passages?|text|information|facts)\b"
_LEAD = re.compile(
    r"\A\s*(?:(?:so|thus|therefore|hence),\s+|(?:sure|certainly|of course)[,!.]\s+"
    rf"|(?:based on|according to) {_SOURCE}[\w ]*,\s+)+",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(r"\s+(?:is|was) the (?:final |correct |right )?answer$")
# What is said about the answer behind it. Titles have capitals there.
_ASIDE = re.compile(
    r"(?<=\S)(?:,\s+(?:which|who|whose|where|since|as (?:it|stated|mentioned))\b"
    rf"|,?\s+(?:according to|based on|as stated in) {_SOURCE}).*"
)
_LIFE_DATES = re.compile(
    r"(?<=\S)\s*\((?:(?:born\b|died\b|[bd]\.)[^()]*|\d{4}\s*[-\u2013\u2014]\s*(?:\d{4})?)\)$"
)
_REASON = re.compile(r"(?<=\S),?\s+because\b.*", re.IGNORECASE | re.DOTALL)
_CLOSED_SENTENCE = re.compile(
    r"(yes|no)(?:\s*[,;:\u2013\u2014]\s*|\s+-\s+|\s+(?=(?:both|neither|they|it|he|she)\b))(.+)",
    re.IGNORECASE,
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|isn't|aren't|wasn't|weren't|do|does|did|has|have|had|can)\b"
)
_WRAPPING = " \t\"'\u201c\u201d\u2018\u2019`*_<>{},;:"


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
    """The short answer in a completion of the frozen LM; empty if there is none.

    It is what the text itself calls its answer (see `concluded_answer`), else the first sentence
    of the first line that says something. What is wrapped around it is taken off: markup, quotes,
    "Based on the context,", ", which is ..." and the final stop; "Yes, both are." is "Yes". A
    sentence is not searched for its answer: that takes knowing the question.
    """
    plain = _plain(text)
    return _concluded(plain) or _short_form(_first_line(_EXPLANATION.sub("", plain)))


def concluded_answer(rationale: str) -> str:
    """The answer that a text states itself, for example "So the answer is X."; empty if none.

    ``\\boxed{X}``, ``<answer>X</answer>`` and ``"answer": "X"`` come first, then "the answer is X"
    and "Answer: X". Of several conclusions the last that says something counts, but none in an
    explanation that follows. Hidden thinking does not count, nor what follows on a new question
    ("Question: ...").
    """
    return _concluded(_plain(rationale))


def _plain(text: str) -> str:
    return _NEXT_QUESTION.sub("", _THINKING.sub("", text))


def _concluded(plain: str) -> str:
    frames = ["".join(groups) for groups in _FRAME.findall(plain)]
    unmarked = _MARKUP.sub("", plain)
    conclusions = [
        _REASON.sub("", part)
        for whole in (unmarked, _EXPLANATION.sub("", unmarked))
        for part in _CONCLUSION.split(whole)[1:]
    ]
    # From the last on: the frames, what comes before an explanation, what the explanation says.
    answers = (_short_form(part) for part in reversed([*conclusions, *frames]))
    return next((answer for answer in answers if answer), "")


def _first_line(plain: str) -> str:
    """The first line that says something; a question or "as follows:" leads to the next one."""
    lines = [line.strip() for line in _EMPTY_LINE.sub("", _MARKUP.sub("", plain)).splitlines()]
    said = [line for line in lines if line]
    telling = [line for line in said if line[-1] not in ":?"]
    return (telling or said or [""])[0]


def _short_form(text: str) -> str:
    """The first sentence, without what is wrapped around an answer."""
    unmarked = _LABEL.sub("", _MARKUP.sub("", text), count=1)
    sentences = split_sentences(_LEAD.sub("", unmarked))
    if not sentences:
        return ""
    answer = _unwrapped(sentences[0])
    closed = _CLOSED_SENTENCE.fullmatch(answer)
    # "No, No, Nanette" is a title: only a sentence's yes or no stands for itself.
    if closed and (closed[2][0].islower() or _VERB.search(closed[2])):
        return closed[1]
    for wrapping in (_IS_THE_ANSWER, _ASIDE, _LIFE_DATES):
        answer = _unwrapped(wrapping.sub("", answer))
    return answer


def _unwrapped(text: str) -> str:
    bare = text.strip(_WRAPPING).rstrip(".!?" + _WRAPPING).strip()
    # A quotation mark whose partner stands within is none of the wrapping.
    halves = (f'"{bare}', f'{bare}"') if bare.count('"') % 2 else ()
    return next((half for half in halves if half in text), bare)
