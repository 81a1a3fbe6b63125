"""Answers in sentences, compared by a metric or by a function of the user's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from lmcot.config.task import FreeText
from lmcot.data.tasks.task import Scores, Task
from lmcot.data.tasks.users_own import load_own
from lmcot.errors import UserError
from lmcot.records import Example, Missing
from lmcot.text.answers import best, f1, inclusion, normalize_answer
from lmcot.text.reading import Reading, plain_text

Metric = Callable[[str, tuple[str, ...]], float]
"""How near an answer comes to the right ones, from 0 to 1."""


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of the words (ROUGE-L, Lin 2004), without
    punctuation, articles and letter case."""
    said, wanted = normalize_answer(answer).split(), normalize_answer(gold).split()
    common = _longest_common(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


_STATES: Final = re.compile(
    r"(?:\bso,?\s+)?\b(?:the\s+)?answer\s{0,9}(?:is\b\s{0,9}:?|:)\s*", re.IGNORECASE
)
_METRICS: Final[dict[str, Callable[[str, str], float]]] = {"rouge_l": rouge_l, "f1": f1}


class FreeTextTask(Task):
    """``f1`` is the metric's value, and an answer from ``right_from`` on is right."""

    def __init__(self, settings: FreeText) -> None:
        """Raises: UserError: if the user's function cannot be loaded."""
        self._settings = settings
        self.note = (
            f"Answers are texts: F1 is {settings.metric}, and EM the share of answers whose "
            f"{settings.metric} is at least {settings.right_from:g}."
        )
        own = bool(settings.functions)
        self._metric = _guarded(settings.metric) if own else _named(settings.metric)

    def read(self, text: str, question: str, *, cut: bool = False) -> Reading:
        """What the text states as its answer, at its whole length, else the whole text."""
        plain = plain_text(text).strip()
        *_, answer = _STATES.split(plain)
        stated = answer != plain
        missing: Missing = "cut" if cut else "" if answer.strip() else "empty"
        return Reading(answer.strip(), missing, stated)

    def scores(self, answer: str, example: Example) -> Scores:
        """The metric, and whether it is high enough."""
        if not answer.strip():
            return Scores.right(False)
        value = self._metric(answer, example.answers)
        within = best(inclusion, answer, example.answers)
        return Scores(float(value >= self._settings.right_from), value, within)

    def contains(self, rationale: str, example: Example) -> bool:
        """Whether what the rationale comes to is right."""
        return self.scores(self.read(rationale, example.question).answer, example).em == 1.0


def _named(name: str) -> Metric:
    metric = _METRICS[name]
    return lambda answer, golds: best(metric, answer, golds)


def _guarded(name: str) -> Metric:
    """The user's function; what goes wrong in it is said in one sentence."""
    function = load_own("task.metric", name, "function")

    def measure(answer: str, golds: tuple[str, ...]) -> float:
        try:
            return float(function(answer, golds))
        except Exception as error:
            raise UserError(
                f"the task's function '{name}' raised {type(error).__name__}: {error}: fix it"
            ) from error

    return measure


def _longest_common(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for at, other in enumerate(second, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]
