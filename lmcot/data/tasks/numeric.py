"""Numbers: GSM8K."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final

from lmcot.config.task import Numeric
from lmcot.data.gold import right_answers, with_answers
from lmcot.data.tasks.task import Scores, Task
from lmcot.data.values import BadRecord
from lmcot.records import Example
from lmcot.text.reading import Reading, conclusions, plain_text
from lmcot.text.sentences import split_sentences

_SIGN: Final = r"(?:(?<![\w)\]])[-\u2212+]\s?)?"
_DIGITS: Final = r"(?:\d{1,3}(?:[,\u2009\u202f\u00a0']\d{3})+(?!\d)|\d{1,40})"
# Each part is bounded, so that a search takes linear time.
_NUMBER: Final = re.compile(
    rf"(?<![\w.])(?P<sign>{_SIGN})[$\u20ac\u00a3\u00a5]?\s?(?P<second>{_SIGN})"
    rf"(?P<whole>{_DIGITS})?(?P<part>\.\d{{1,40}})?"
    r"(?P<power>e[-+]?\d{1,3})?(?:\s?/\s?(?P<under>\d{1,15})(?![\d.]))?"
    r"(?:\s?(?P<scale>thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
_SCALES: Final = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MARKED: Final = re.compile(r"####[ \t]*(.+)")
_CALCULATOR: Final = re.compile(r"<<[^<>\n]*>>")
"""What GSM8K's solutions hold for a calculator."""


class NumericTask(Task):
    """Answers are numbers; a unit, a currency's sign, or words around them do not count."""

    note = "Answers are numbers: EM, F1 and inclusion are the share of right ones."

    def __init__(self, settings: Numeric) -> None:
        self._settings = settings

    def fields(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """A record whose answers hold a number; what GSM8K has before ``####`` is its solution."""
        given = right_answers(record)
        marked = [_MARKED.search(one) for one in given]
        golds = [mark[1] if mark else one for one, mark in zip(given, marked, strict=True)]
        numbers = [value for one in golds if (value := number_of(one)) is not None]
        if len(numbers) < len(golds):
            raise BadRecord(f"the answer '{golds[0][:40]}' holds no number")
        found = with_answers(record, [_written(one) for one in numbers])
        if marked[0] is not None and record.get("solution") is None:
            before = given[0][: marked[0].start()]
            found["solution"] = [_CALCULATOR.sub("", line) for line in before.splitlines()]
        return found

    def read(self, text: str, question: str, *, cut: bool = False) -> Reading:
        """The number that the text states as its answer (after ``####``, or "the answer is"), else
        its last number."""
        plain = plain_text(text)
        stated = self._stated(text, plain)
        number = stated or next((one for one, _ in reversed(numbers_in(plain))), "")
        # A number at the end of a text that was cut may go on; without a statement, so may the
        # reasoning.
        within = cut and (not stated or plain.rstrip().endswith(number))
        value = number_of(number)
        if value is None:
            return Reading("", "cut" if cut else "empty")
        return Reading(_written(value), "cut" if within else "", bool(stated))

    def scores(self, answer: str, example: Example) -> Scores:
        """Right if it is within the tolerance of a right answer."""
        value = number_of(answer)
        golds = map(number_of, example.answers)
        near = (value is not None and g is not None and self._near(value, g) for g in golds)
        return Scores.right(any(near))

    def contains(self, rationale: str, example: Example) -> bool:
        """Whether the rationale comes to the right number."""
        return self.scores(self.read(rationale, example.question).answer, example).em == 1.0

    def mentions(self, text: str, example: Example) -> Sequence[str]:
        """The right answers, and the numbers of the text that are right, as they stand there."""
        found = [one for one, _ in numbers_in(text) if self.scores(one, example).em == 1.0]
        return (*example.answers, *dict.fromkeys(found))

    def key(self, answer: str) -> str:
        """The number, so that 2, 2.0 and 2.00 are one."""
        value = number_of(answer)
        return "" if value is None else str(value)

    def _near(self, value: Fraction, gold: Fraction) -> bool:
        settings = self._settings
        share = Fraction(settings.relative_tolerance) * abs(gold)
        return abs(value - gold) <= max(Fraction(settings.tolerance), share)

    def _stated(self, text: str, plain: str) -> str:
        """The number that a text calls its answer, as it stands there; empty if there is none."""
        marked = [one[1] for one in _MARKED.finditer(plain)]
        for part in [*reversed(marked), *conclusions(text)]:
            sentence = next(iter(split_sentences(part.strip().split("\n", 1)[0])), "")
            # "5 + 3 = 8" comes to what is on its right; otherwise the first number counts.
            _, equals, right = sentence.rpartition("=")
            found = numbers_in(right) if equals else numbers_in(sentence)
            if found:
                return found[0][0]
        return ""


def numbers_in(text: str) -> list[tuple[str, Fraction]]:
    """The numbers of a text, each as it stands there and its value."""
    found = []
    for match in _NUMBER.finditer(text):
        if match["whole"] is None and match["part"] is None:
            continue
        value = _value(match)
        if value is not None:
            found.append((match[0].strip(), value))
    return found


def number_of(text: str) -> Fraction | None:
    """The value of the last number in a text; None if it holds none."""
    found = numbers_in(text)
    return found[-1][1] if found else None


def _value(match: re.Match[str]) -> Fraction | None:
    digits = re.sub(r"\D", "", match["whole"] or "0")
    try:
        value = Fraction(Decimal(f"{digits}{match['part'] or ''}{match['power'] or ''}"))
        if match["under"] is not None:
            value /= int(match["under"])
    except (InvalidOperation, ZeroDivisionError):
        return None
    value *= _SCALES.get((match["scale"] or "").lower(), 1)
    minus = any(sign in (match["sign"] + match["second"]) for sign in "-\u2212")
    return -value if minus else value


def _written(value: Fraction) -> str:
    """A number as answers show it: whole, as a decimal where that is exact, else as a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = next(n for n in range(1, 400) if 10**n % value.denominator == 0)
    scaled = abs(value.numerator) * 10**places // value.denominator
    digits = str(scaled).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
