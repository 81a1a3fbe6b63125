"""Rationales made of supporting facts, and what they lose where they are too long."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lmcot.config import Config, SupportingFactsTeacher, parse_config
from lmcot.data.facts import FactsRationale, facts_rationale
from lmcot.errors import UserError
from lmcot.records import Example, Paragraph, SupportingFact

TEACHER = SupportingFactsTeacher(kind="supporting_facts")
VELM = Paragraph(
    "Velm (town)",
    ("Velm is old.", "Velm lies on the Brann, a river.", "It has a mill.", "Its mayor is Ott."),
)
BRANN = Paragraph("Brann", ("The Brann is long.", "It ends in the Grey Sea."))
OTHER = Paragraph("Parrow", ("Parrow is a hill.",))


def example(question: str, answer: str, *facts: tuple[str, int]) -> Example:
    pointers = tuple(SupportingFact(*fact) for fact in facts)
    return Example("q", question, answer, (OTHER, VELM, BRANN), pointers)


BRIDGE = example(
    "Into which sea does the river of the town of Velm flow?", "Grey Sea",
    ("Velm (town)", 0), ("Velm (town)", 1), ("Velm (town)", 2), ("Brann", 0), ("Brann", 1),
)  # fmt: skip


def words(limit: int) -> Callable[[str], bool]:
    return lambda text: len(text.split()) <= limit


def made(of: Example, limit: int) -> FactsRationale:
    return facts_rationale(of, TEACHER, words(limit))


def test_what_fits_is_left_as_it_is() -> None:
    whole = (
        "Velm is old. Velm lies on the Brann, a river. It has a mill. The Brann is long. "
        "It ends in the Grey Sea. So the answer is Grey Sea."
    )
    assert made(BRIDGE, 30) == FactsRationale(whole, 0, True, True)


def test_the_sentences_that_the_answer_does_not_need_go_first() -> None:
    """The bridge and the answer stay; of the others, first those that share no word with the
    question beside their paragraph's title."""
    needed = "Velm lies on the Brann, a river. It ends in the Grey Sea. So the answer is Grey Sea."
    assert made(BRIDGE, 19) == FactsRationale(needed, 3, True, True)
    with_one = "Velm is old. " + needed
    assert made(BRIDGE, 22) == FactsRationale(with_one, 2, True, True)


def test_at_last_the_paragraph_of_the_answer_is_enough() -> None:
    alone = "It ends in the Grey Sea. So the answer is Grey Sea."
    assert made(BRIDGE, 12) == FactsRationale(alone, 4, False, True)
    with_one = FactsRationale("Velm is old. " + alone, 3, True, True)
    assert made(BRIDGE, 18) == with_one, "the bridge would be too long"
    assert not made(BRIDGE, 11).fits


@pytest.mark.parametrize(
    ("question", "answer"),
    [("Which is older, Velm or the Brann?", "Velm"), ("Are Velm and the Brann old?", "yes")],
)
def test_a_comparison_keeps_a_sentence_of_each_paragraph(question: str, answer: str) -> None:
    compared = example(question, answer, ("Velm (town)", 0), ("Velm (town)", 1), ("Brann", 0))
    tail = f"So the answer is {answer}."
    short = made(compared, 17)
    assert short.fits
    assert short.complete
    assert short.text.endswith(f"The Brann is long. {tail}")
    assert not made(compared, 11).fits


def test_a_sentence_that_merely_names_the_answer_shows_nothing_in_a_comparison() -> None:
    compared = example(
        "Whose mayor is Ott, Velm or the Brann?", "Velm", ("Velm (town)", 1), ("Velm (town)", 3)
    )
    assert made(compared, 9).text == "Its mayor is Ott. So the answer is Velm."


def test_a_title_stands_before_a_paragraph_that_does_not_name_it() -> None:
    titled = SupportingFactsTeacher(kind="supporting_facts", titles=True)
    both = example("Where?", "Grey Sea", ("Velm (town)", 2), ("Velm (town)", 3), ("Brann", 1))
    whole = facts_rationale(both, titled, words(99)).text
    assert whole == (
        "Velm (town): It has a mill. Its mayor is Ott. Brann: It ends in the Grey Sea. "
        "So the answer is Grey Sea."
    )
    named = example("Where?", "Brann", ("Velm (town)", 1), ("Velm (town)", 2))
    assert facts_rationale(named, titled, words(99)).text == (
        "Velm lies on the Brann, a river. It has a mill. So the answer is Brann."
    )
    shorter = facts_rationale(both, titled, words(19))
    assert shorter.left_out == 1
    assert shorter.text.startswith("Velm (town): It has a mill. Brann: It ends")


def test_too_long_is_rejected_where_the_settings_say_so() -> None:
    strict = SupportingFactsTeacher(kind="supporting_facts", shorten=False)
    found = facts_rationale(BRIDGE, strict, words(19))
    assert (found.fits, found.left_out) == (False, 0)


def test_the_template_is_a_setting() -> None:
    given = SupportingFactsTeacher(kind="supporting_facts", template="{facts} ({answer})")
    short = example("Where?", "{facts}", ("Parrow", 0))
    assert facts_rationale(short, given, words(99)).text == "Parrow is a hill. ({facts})"


@pytest.mark.parametrize(
    ("template", "why"),
    [("So: {answer}", "lacks the field {facts}"), ("{facts} {fact}", "has the field {fact}")],
)
def test_a_template_with_other_fields_is_refused(template: str, why: str) -> None:
    with pytest.raises(UserError, match=why.replace("{", r"\{")) as caught:
        _with_template(template)
    assert "teacher" in str(caught.value)


def _with_template(template: str) -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "teacher": {"kind": "supporting_facts", "template": template},
            "frozen": {"backend": "transformers", "source": "random:llama"},
        }
    )
