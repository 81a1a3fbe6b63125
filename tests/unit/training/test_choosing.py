"""Which of a question's good rationales is kept."""

from __future__ import annotations

from dataclasses import replace

from lmcot.records import Annotation, Example, Paragraph
from lmcot.training.choosing import BestBy, choose
from lmcot.training.reasons import ANOTHER_IS_BETTER, NEAR_DUPLICATE, RIGHT

QUESTIONS = [
    Example(f"q{n}", f"Where is place {n}?", "Velm",
            (Paragraph(f"Place {n}", (f"Place {n} is in Velm, near the sea.",)),))
    for n in range(2)
]  # fmt: skip
SUPPORTED = "Place 0 is near the sea. So the answer is Velm."
LONGER = "Place 0 is near the sea. It is in Velm, near the sea. So the answer is Velm."
INVENTED = "Ott lives in Velm. So it is Velm."


def line(text: str, sample: int, question: int = 0, *, good: bool = True) -> Annotation:
    reason = "right answer" if good else "the teacher's answer is wrong"
    return Annotation(f"q{question}", "frozen", text, "Velm", good, reason, sample=sample)


def chosen(*lines: Annotation, best_by: BestBy = "factuality") -> list[tuple[bool, str]]:
    by_question: dict[str, list[Annotation]] = {}
    for one in lines:
        by_question.setdefault(one.example_id, []).append(one)
    found = choose(QUESTIONS, by_question, best_by, 0.9, "right answer")
    return [(one.kept, one.reason) for one in found]


KEPT, WORSE = (True, RIGHT), (False, ANOTHER_IS_BETTER)
WRONG = (False, "the teacher's answer is wrong")


def test_the_one_that_its_passages_support_is_kept() -> None:
    lines = line(INVENTED, 0), line("No.", 1, good=False), line(LONGER, 2), line(SUPPORTED, 3)
    assert chosen(*lines) == [WORSE, WRONG, WORSE, KEPT]
    assert chosen(*lines, best_by="shortest") == [KEPT, WRONG, WORSE, WORSE]
    assert chosen(*lines[1:], best_by="first") == [WRONG, KEPT, WORSE]


def test_one_without_a_hint_is_preferred() -> None:
    assert chosen(line(INVENTED, 0), replace(line(SUPPORTED, 0), hinted=True)) == [KEPT, WORSE]


def test_of_near_duplicates_the_first_question_keeps_one() -> None:
    other = line(SUPPORTED, 0, question=1)
    second = line("Place 1 is near the sea. So Velm.", 1, question=1)
    assert chosen(line(SUPPORTED, 0), other) == [KEPT, (False, NEAR_DUPLICATE)]
    best = line(SUPPORTED, 0), other, second
    assert chosen(*best, best_by="first") == [KEPT, (False, NEAR_DUPLICATE), KEPT]


def test_an_earlier_choice_is_made_again() -> None:
    """With another sample, what was rejected as worse may be the best of those that are left."""
    first = choose(QUESTIONS, {"q0": [line(INVENTED, 0), line(SUPPORTED, 1)]}, "factuality", None,
                   "right answer")  # fmt: skip
    assert [one.kept for one in first] == [False, True]
    again = choose(QUESTIONS, {"q0": first[:1]}, "factuality", None, "right answer")
    assert [(one.kept, one.reason) for one in again] == [KEPT]
