"""Which rationales are good enough to learn from: pure functions of question and rationale."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from lmcot.config.teachers import FilterSettings
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.records import Example, Prompt
from lmcot.text.content import content_words
from lmcot.text.sentences import split_sentences

_WORD: Final = re.compile(r"\w+")
_LABEL: Final = re.compile(r"^([^\n{}:]{1,40}:)", re.MULTILINE)
_CONCLUSION: Final = re.compile(r"(?:\bso,?\s+)?\bthe\s+answer\s+is\b.*", re.IGNORECASE)
_HINT: Final = re.compile(
    r"\b(?:right|correct|given|provided|known|hinted)\s+answer\b"
    r"|\banswer\s+(?:is|was|has\s+been)\s+(?:already\s+)?(?:given|provided|known|hinted)\b"
    r"|\bas\s+(?:is\s+)?(?:given|provided|hinted|stated\s+in\s+the\s+(?:hint|question))\b"
    r"|\b(?:since|because|given\s+that|(?:we|i)\s+(?:already\s+)?know(?:\s+that)?)\s+the\s+answer\b"
    r"|\bhints?\b",
    re.IGNORECASE,
)

TOO_LONG: Final = "longer than policy.max_new_tokens"
MERELY_THE_ANSWER: Final = "it is merely the answer"
REPEATS_QUESTION: Final = "it repeats the question"
WORDING_OF_PROMPT: Final = "it holds wording of the prompt"
TELLS_THE_HINT: Final = "it tells that the answer was given"


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of a run."""

    settings: FilterSettings
    fits: Callable[[str], bool]
    """Whether the small LM may write so long a rationale."""
    labels: tuple[str, ...] = ()
    """Labels in the prompt that rationales answer, such as ``Question:``."""
    task: Task = EXTRACTIVE_QA
    """How answers are read and compared."""

    def reason(
        self, example: Example, rationale: str, *, prompt: Prompt = (), hinted: bool = False
    ) -> str:
        """Why a rationale is rejected; empty if it is good.

        Args:
            prompt: what it answers, without the question and its passages.
            hinted: the prompt held the answer as a hint.
        """
        settings = self.settings
        if not self.fits(rationale):
            return TOO_LONG
        if settings.min_words and merely_answers(rationale, example.answers, settings.min_words):
            return MERELY_THE_ANSWER
        if settings.repeats_question and repeats_question(example, rationale):
            return REPEATS_QUESTION
        if settings.prompt_words and (
            holds_label(rationale, self.labels)
            or copies_prompt(example, rationale, prompt, settings.prompt_words)
        ):
            return WORDING_OF_PROMPT
        return TELLS_THE_HINT if hinted and tells_hint(rationale) else ""


def is_right(
    answer: str,
    example: Example,
    by: Literal["em", "f1", "inclusion"],
    min_f1: float,
    task: Task = EXTRACTIVE_QA,
) -> bool:
    """Whether an answer counts as right."""
    if not answer:
        return False
    scores = task.scores(answer, example)
    return scores.f1 >= min_f1 if by == "f1" else bool(getattr(scores, by) == 1.0)


def merely_answers(rationale: str, answers: Sequence[str], least: int) -> bool:
    """Whether a rationale, without its conclusion, has fewer than ``least`` words beside those of
    an answer."""
    said = Counter(word for sentence in _body(rationale) for word in _words(sentence))
    return any((said - Counter(_words(answer))).total() < least for answer in answers)


def repeats_question(example: Example, rationale: str) -> bool:
    """Whether a rationale, without its conclusion, has only words of the question."""
    asked = content_words(example.question).keys()
    return all(content_words(sentence).keys() <= asked for sentence in _body(rationale))


def holds_label(rationale: str, labels: Sequence[str]) -> bool:
    """Whether a line of the rationale begins with a label of the prompt."""
    lines = [line.strip().lower() for line in rationale.splitlines()]
    return any(line.startswith(label.lower()) for line in lines for label in labels)


def copies_prompt(example: Example, rationale: str, prompt: Prompt, run: int) -> bool:
    """Whether ``run`` words in a row within a sentence come from the prompt.

    The question and its passages may be quoted; conclusions are alike, and do not count.

    Args:
        prompt: without the question and its passages.
    """
    own = _runs(example.question, run).union(
        *(_runs(" ".join([one.title, *one.sentences]), run) for one in example.context)
    )
    said = {
        words for sentence in _body(rationale) for words in _runs(sentence, run) if words not in own
    }
    return bool(said) and any(said & _runs(message.content, run) for message in prompt)


def tells_hint(rationale: str) -> bool:
    """Whether a rationale says that its answer was given."""
    return _HINT.search(rationale) is not None


def prompt_labels(template: str) -> tuple[str, ...]:
    """The labels in the text of a template, such as ``Question:``."""
    return tuple(_LABEL.findall(template))


@lru_cache(maxsize=256)  # demonstrations and instructions are those of every question
def _runs(text: str, length: int) -> frozenset[str]:
    """The sequences of so many words, in lower case."""
    words = _words(text)
    return frozenset(" ".join(words[at : at + length]) for at in range(len(words) - length + 1))


def _body(rationale: str) -> list[str]:
    """The sentences, without what concludes: ``So the answer is ...``."""
    return [_CONCLUSION.sub("", sentence) for sentence in split_sentences(rationale)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
