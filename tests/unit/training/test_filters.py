"""Why a rationale is not good enough, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.config.teachers import FilterSettings
from lmcot.records import Example, Message, Paragraph
from lmcot.training.filters import Filters, is_right, prompt_labels, tells_hint

EXAMPLE = Example(
    "q",
    "Which town lies on the river Brann?",
    "Velm",
    (Paragraph("Velm", ("Velm is a town with a mill.", "It lies on the river Brann, they say.")),),
    aliases=("Old Velm",),
)
PROMPT = (
    Message("system", "Quote the facts that decide the question, then end with the answer."),
    Message("user", "Parrow is the hill that nobody has ever climbed in winter.\n\nQuestion: Why?"),
    Message("assistant", "It is high. So the answer is that it is so high."),
)
GOOD = "Velm is a town with a mill. It lies on the river Brann. So the answer is Velm."


def reason(rationale: str, hinted: bool = False, **settings: Any) -> str:
    filters = Filters(FilterSettings(**settings), lambda text: len(text) < 150, ("Question:",))
    return filters.reason(EXAMPLE, rationale, prompt=PROMPT, hinted=hinted)


@pytest.mark.parametrize(
    ("rationale", "expected"),
    [
        (GOOD, ""),
        (GOOD + " word" * 40, "longer than policy.max_new_tokens"),
        ("So the answer is Velm.", "it is merely the answer"),
        ("Velm.", "it is merely the answer"),
        ("It is Velm. The answer is Velm.", "it is merely the answer"),
        ("It is Old Velm, the answer is Old Velm", "it is merely the answer"),
        ("Which town lies on the river Brann? So the answer is Velm.", "it repeats the question"),
        ("A town lies on the Brann. So the answer is Velm.", "it repeats the question"),
        ("Velm lies on the Brann. So the answer is Velm.", ""),
        (
            "I quote the facts that decide the question, Velm has a mill. So the answer is Velm.",
            "it holds wording of the prompt",
        ),
        (
            "Parrow is the hill that nobody has ever climbed. So the answer is Velm.",
            "it holds wording of the prompt",
        ),
        ("Velm has a mill.\nquestion: What? The answer is Velm.", "it holds wording of the prompt"),
        ("It has a mill. So the answer is that it is so high.", ""),
    ],
)
def test_each_fault_has_its_reason(rationale: str, expected: str) -> None:
    assert reason(rationale) == expected


def test_its_own_passages_may_be_quoted_though_the_prompt_holds_them() -> None:
    quoted = "Velm is a town with a mill. So the answer is Velm."
    prompt = (*PROMPT, Message("user", " ".join(EXAMPLE.context[0].sentences)))
    filters = Filters(FilterSettings(), lambda text: True)
    assert filters.reason(EXAMPLE, quoted, prompt=prompt) == ""


def test_filters_can_be_switched_off() -> None:
    assert reason("Velm.", min_words=0, repeats_question=False) == ""
    quoting = "Quote the facts that decide the question. So the answer is Velm."
    assert reason(quoting, prompt_words=0) == ""
    assert reason(quoting, prompt_words=9) == ""


@pytest.mark.parametrize(
    "telling",
    [
        "As given, it lies in Velm.",
        "The answer is given, it is Velm.",
        "The right answer is Velm since it has a mill.",
        "Since the answer is Velm, the river is the Brann.",
        "The hint says Velm.",
        "We know the answer is Velm.",
    ],
)
def test_a_hint_must_not_show(telling: str) -> None:
    assert tells_hint(telling)
    hinted = f"{telling} There is a mill."
    assert reason(hinted, hinted=True) == "it tells that the answer was given"
    assert reason(hinted) == ""


@pytest.mark.parametrize("plain", [GOOD, "The award was given to Ott.", "He answered the king."])
def test_other_rationales_tell_no_hint(plain: str) -> None:
    assert not tells_hint(plain)


def test_right_by_the_measure_of_the_settings() -> None:
    example = Example("q", "Which sea?", "Grey Sea", (), aliases=("Sea of Ott",))
    assert is_right("the grey sea", example, "em", 1.0)
    assert is_right("sea of Ott", example, "f1", 1.0)
    assert not is_right("Sea", example, "f1", 0.7), "F1 is 2/3"
    assert is_right("Sea", example, "f1", 0.6)
    assert not is_right("the cold Grey Sea", example, "em", 0.0)
    assert is_right("the cold Grey Sea", example, "inclusion", 1.0)
    assert not is_right("", example, "f1", 0.0)


def test_labels_of_a_template() -> None:
    assert prompt_labels("{context}\n\nQuestion: {question}\nReasoning:") == (
        "Question:", "Reasoning:",
    )  # fmt: skip
