"""Yes or no: StrategyQA, BoolQ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmcot.data.gold import right_answers, with_answers
from lmcot.data.tasks.task import Scores, Task
from lmcot.data.values import BadRecord
from lmcot.records import Example
from lmcot.text.reading import Reading, plain_text

_TRUTHS: Final = {"yes": "yes", "true": "yes", "1": "yes", "no": "no", "false": "no", "0": "no"}
_WORD: Final = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)


class BooleanTask(Task):
    """Answers are ``yes`` and ``no``; true and false, 1 and 0 mean the same in a file."""

    note = "Answers are yes or no: EM, F1 and inclusion are the share of right ones."

    def fields(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """A record whose answer is yes or no; StrategyQA's ``facts`` are its solution."""
        given = right_answers(record)[0]
        answer = _TRUTHS.get(given.strip().lower())
        if answer is None:
            raise BadRecord(f"the answer '{given[:40]}' is neither yes nor no, true nor false")
        found = with_answers(record, [answer])
        if found.get("solution") is None and record.get("facts") is not None:
            found["solution"] = record["facts"]
        return found

    def read(self, text: str, question: str, *, cut: bool = False) -> Reading:
        """``yes`` or ``no``: the first such word of what the text states as its answer, or the
        first word of the text, else the only one of the two that the text holds."""
        base = super().read(text, question, cut=cut)
        word = _WORD.search(base.answer) if base.stated else _WORD.match(base.answer)
        if word is not None:
            return Reading(_TRUTHS[word[1].lower()], "", base.stated)
        said = {_TRUTHS[one.lower()] for one in _WORD.findall(plain_text(text))}
        if len(said) == 1 and not cut:
            return Reading(said.pop(), "", stated=False)
        return Reading("", "cut" if cut else "empty")

    def scores(self, answer: str, example: Example) -> Scores:
        """Right or wrong."""
        said = _TRUTHS.get(answer.strip().lower())
        return Scores.right(said is not None and said == example.answer)

    def options(self, question: str) -> Sequence[str]:
        """Yes and no."""
        return ("yes", "no")

    def contains(self, rationale: str, example: Example) -> bool:
        """Whether the rationale comes to the right answer."""
        return self.scores(self.read(rationale, example.question).answer, example).em == 1.0
