"""Questions with options: ARC, CommonsenseQA, OpenBookQA, MMLU."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmcot.config.task import MultipleChoice
from lmcot.data.gold import OPTIONS, with_answers
from lmcot.data.tasks.task import Scores, Task
from lmcot.data.values import BadRecord, decoded
from lmcot.records import Example
from lmcot.text.answers import inclusion, normalize_answer
from lmcot.text.reading import Reading, conclusions, plain_text

_OPTION: Final = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]+(\S.*)$", re.MULTILINE)
_ALONE: Final = re.compile(
    r"\W*(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|answer)?\s*\(?([A-Za-z])\)?\W*",
    re.IGNORECASE,
)
_LEADING: Final = re.compile(
    r"\s*(?:(?:option|choice)\s+)?(?:\(([A-Z])\)|([A-Z])[).:])", re.IGNORECASE
)
_BRACKETED: Final = re.compile(r"\(([A-Z])\)")
_STEMS: Final = ("question", "question_stem", "stem", "query", "input")
_KEYS: Final = ("answerKey", "answer_key", "answerkey", "correct", "answer", "label", "target")


def options_of(question: str) -> dict[str, str]:
    """The options in a question's text by letter: the lines ``(A) text``, ``B. text`` from A on;
    empty if there are fewer than two."""
    found: dict[str, str] = {}
    for letter, text in _OPTION.findall(question):
        if letter == "A":
            found = {}
        if letter == string.ascii_uppercase[len(found) % 26]:
            found[letter] = text.strip()
    return found if len(found) > 1 else {}


class MultipleChoiceTask(Task):
    """A question's options are lines of its text: ``(A) ...``, so that a file, a prompt and a
    request show them in one form. An answer is an option's letter, or its text."""

    note = "Answers are options: EM, F1 and inclusion are the share of right ones."

    def __init__(self, settings: MultipleChoice) -> None:
        self._labels = settings.answers == "labels"

    def fields(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """A record with its options in the question, and the right one as letter and as text."""
        stem, given = _stem_and_options(record)
        labels, texts = _labels_and_texts(given) if given is not None else ([], [])
        if given is None:
            texts = list(options_of(stem).values())
            question = stem
        else:
            lines = (f"({_letter(at)}) {text}" for at, text in enumerate(texts))
            question = "\n".join([stem.strip(), *lines])
        if len(texts) < 2:
            raise BadRecord(
                "there are no options: give 'choices', or lines '(A) ...' in the question"
            )
        if len(texts) > len(string.ascii_uppercase):
            raise BadRecord(f"there are {len(texts)} options, more than 26")
        at = _right(record, labels, texts)
        forms = [_letter(at), texts[at]]
        kept = {name: value for name, value in record.items() if name not in _STEMS}
        return with_answers({**kept, "question": question}, forms if self._labels else forms[::-1])

    def read(self, text: str, question: str, *, cut: bool = False) -> Reading:
        """The option that the text states as its answer, or that it begins with or names alone."""
        options = options_of(question)
        base = super().read(text, question, cut=cut)
        if not options:
            return base
        stated = [
            one for part in conclusions(text) if (one := option_in(_first_line(part), options))
        ]
        found = stated[0] if stated else option_in(base.answer, options)
        if not found and not cut:
            bracketed = [one for one in _BRACKETED.findall(plain_text(text)) if one in options]
            found = bracketed[-1] if bracketed else ""
        if not found:
            return Reading("", "cut" if cut else "empty")
        return Reading(found if self._labels else options[found], "", bool(stated))

    def scores(self, answer: str, example: Example) -> Scores:
        """Right if it is the right option, by letter or by text."""
        options = options_of(example.question)
        said = option_in(answer, options)
        right = option_in(example.answer, options)
        return Scores.right(bool(said) and said == right)

    def options(self, question: str) -> Sequence[str]:
        """The letters of the options, or their texts if answers are texts."""
        found = options_of(question)
        return tuple(found) if self._labels else tuple(dict.fromkeys(found.values()))

    def contains(self, rationale: str, example: Example) -> bool:
        """Whether the rationale comes to the right option, or holds its text."""
        said = self.read(rationale, example.question).answer
        if said:
            return self.scores(said, example).em == 1.0
        texts = (one for one in example.answers if len(one) > 1)
        return any(inclusion(rationale, one) == 1.0 for one in texts)


def option_in(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the option that an answer is; empty if it is none, or several."""
    wanted = normalize_answer(answer)
    alone = _ALONE.fullmatch(answer)
    if alone is not None and alone[1].upper() in options:
        return alone[1].upper()
    same = [letter for letter, text in options.items() if normalize_answer(text) == wanted]
    if len(same) == 1:
        return same[0]
    leading = _LEADING.match(answer)
    letter = (leading[1] or leading[2]).upper() if leading is not None else ""
    if letter in options:
        return letter
    held = {one: text for one, text in options.items() if inclusion(answer, text) == 1.0}
    # "carbon dioxide" holds "carbon", too: of options within options the longer one is meant.
    whole = [
        one
        for one, text in held.items()
        if not any(inclusion(other, text) == 1.0 for at, other in held.items() if at != one)
    ]
    return whole[0] if len(whole) == 1 else ""


def _stem_and_options(record: Mapping[str, Any]) -> tuple[str, object]:
    """The question without its options, and the options as they came; None if there are none."""
    name = next((one for one in _STEMS if record.get(one) is not None), None)
    if name is None:
        raise BadRecord("the field 'question' is missing")
    stem, inside = record[name], record
    if isinstance(stem, Mapping):  # as AI2 and CommonsenseQA publish their files
        inside = stem
        stem = stem.get("stem") or stem.get("text")
    if not isinstance(stem, str) or not stem.strip():
        raise BadRecord(f"the field '{name}' must be a non-empty string")
    places = ((place, one) for place in (record, inside) for one in OPTIONS)
    found = next((place[one] for place, one in places if place.get(one) is not None), None)
    return stem, decoded(found)


def _labels_and_texts(given: object) -> tuple[list[str], list[str]]:
    """The options' labels, if they have any, and their texts."""
    if isinstance(given, Mapping) and ("text" in given or "texts" in given):
        labels, texts = given.get("label") or (), given.get("text") or given.get("texts")
    elif isinstance(given, Mapping):
        labels, texts = list(given), list(given.values())
    elif isinstance(given, Sequence) and all(isinstance(one, Mapping) for one in given):
        labels = [one.get("label") for one in given if one.get("label") is not None]
        texts = [one.get("text") for one in given]
    else:
        labels, texts = (), given
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        raise BadRecord("the options must be a list")
    if labels and len(labels) != len(texts):
        raise BadRecord(f"there are {len(labels)} labels, but {len(texts)} options")
    if not all(isinstance(one, str | int) and str(one).strip() for one in texts):
        raise BadRecord("every option must be a text that is not empty")
    return [str(one).strip() for one in labels], [" ".join(str(one).split()) for one in texts]


def _right(record: Mapping[str, Any], labels: Sequence[str], texts: Sequence[str]) -> int:
    """The place of the right option: by its label, its text, its letter, or its index from 0."""
    name = next((one for one in _KEYS if record.get(one) not in (None, "")), None)
    if name is None:
        raise BadRecord("the field 'answerKey' or 'answer' is missing")
    key = record[name]
    while isinstance(key, Sequence) and not isinstance(key, str) and len(key) == 1:
        key = key[0]
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise BadRecord(f"the field '{name}' must name one option")
    wanted = str(key).strip()
    for known in (labels, texts):
        places = [at for at, one in enumerate(known) if one.casefold() == wanted.casefold()]
        if len(places) == 1:
            return places[0]
    letter = string.ascii_uppercase.find(wanted.upper()) if len(wanted) == 1 else -1
    at = int(wanted) if not labels and wanted.isdecimal() else letter if not labels else -1
    if not 0 <= at < len(texts):
        raise BadRecord(f"the answer '{wanted[:40]}' is none of the {len(texts)} options")
    return at


def _letter(at: int) -> str:
    return string.ascii_uppercase[at]


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
