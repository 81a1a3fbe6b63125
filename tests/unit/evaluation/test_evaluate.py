"""Evaluation without actors: rows, controls, votes, overlap, what is kept and what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lmcot.config import EvaluateSettings, parse_config
from lmcot.config.rows import ROWS, find_row, masked
from lmcot.errors import UserError
from lmcot.evaluation.costs import break_even, costs, flops, frontier, size_in_words
from lmcot.evaluation.leakage import check_overlap
from lmcot.evaluation.predictions import (
    Attempt,
    Prediction,
    Rationales,
    alike_votes,
    lacking_answers,
    one_answer,
    predict,
    row_result,
)
from lmcot.evaluation.requests import Votes, answers_of
from lmcot.evaluation.rows import check_rows, chosen_rows, shown_texts
from lmcot.evaluation.store import Kept, fingerprint
from lmcot.frozen.cached import Replies
from lmcot.records import (
    Answer,
    Completion,
    Example,
    Failure,
    FailureKind,
    Paragraph,
    SupportingFact,
    Usage,
)
from lmcot.text.copying import copied_share

SETTINGS: dict[str, Any] = {
    "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
    "policy": {"source": "random:t5"},
    "refine": {"start_from": "base"},
}
FROZEN = {"backend": "transformers", "source": "random:llama"}
PASSAGE = Paragraph("Elko", ("Elko lies on the Humboldt River.", "It is a town in Nevada."))
EXAMPLE = Example(
    "q1", "Which river?", "Humboldt River", (PASSAGE,), (SupportingFact("Elko", 0),), "bridge"
)
DOWN = Failure(FailureKind.TRANSIENT, "the endpoint is down")


def _mark(frozen: dict[str, Any], *more: Any, **settings: Any) -> str:
    config = parse_config({**SETTINGS, "frozen": {**FROZEN, **frozen}, **settings})
    return fingerprint(config, "", *more)


@pytest.mark.parametrize(
    ("frozen", "settings"),
    [
        ({"budget": {"max_requests": 9}}, {}),
        ({"cache": {"enabled": False}}, {}),
        ({}, {"failures": {"max_data_share": 0.9}}),
        ({}, {"refine": {"start_from": "base", "steps": 7}}),
        ({}, {"evaluate": {"rows": ["cot"]}}),
    ],
)
def test_what_a_resumed_run_may_change_keeps_predictions(
    frozen: dict[str, Any], settings: dict[str, Any]
) -> None:
    assert _mark(frozen, **settings) == _mark({})


def test_what_answers_depend_on_does_not(tmp_path: Path) -> None:
    marks = [
        _mark({}),
        _mark({"max_answer_tokens": 9}),
        _mark({}, prompts={"demonstrations": 1}),
        _mark({"source": "random:t5"}),
        _mark({}, 5, 0.7),
        _mark({}, 9, 0.7),
    ]
    config = parse_config({**SETTINGS, "frozen": FROZEN})
    for text in ("some weights", "other, longer weights"):
        (tmp_path / "model.safetensors").write_text(text, encoding="utf-8")
        marks.append(fingerprint(config, str(tmp_path)))
    assert len(set(marks)) == len(marks)


def rows(policies: list[str], *asked: str) -> list[str]:
    settings = {"rows": asked} if asked else {}
    chosen = chosen_rows(EvaluateSettings.model_validate(settings), policies)
    return [row.name for row in chosen]


def test_rows_that_nobody_named_are_those_there_are_policies_for() -> None:
    assert rows(["base"]) == ["standard", "cot", "guided_base", "small_alone"]
    assert "guided_distilled" not in rows(["base", "refined"])
    assert rows(["base", "distilled", "refined"])[-2:] == ["guided_refined", "small_alone"]


def test_rows_that_were_named_must_be_possible() -> None:
    """In the report's order, whatever the order of the settings."""
    assert rows(["base"], "control_empty", "cot+sc", "cot") == ["cot", "cot+sc", "control_empty"]
    with pytest.raises(UserError, match=r"holds 'guided_refined\+sc', but there is no refined pol"):
        rows(["base", "distilled"], "standard", "guided_refined+sc")
    with pytest.raises(UserError, match=r"holds 'guided_distilled'.*run 'lmcot distill'"):
        rows(["base", "refined"], "guided_distilled")


def test_controls_take_the_most_trained_policy_and_say_so() -> None:
    two = ["base", "distilled"]
    assert find_row("control_masked").policy_among(two) == "distilled"
    assert find_row("guided_base+sc").policy_among(two) == "base"
    assert find_row("control_oracle").policy_among(two) == ""
    assert find_row("cot+sc").policy_among(two) == ""
    assert "the distilled small LM" in find_row("control_shuffled").label(two, 5)
    assert find_row("cot+sc").label(two, 7) == "frozen LM reasons, then answers, vote of 7"


def test_the_table_of_rows() -> None:
    """Order, opponents in the report, and which rows ask for samples."""
    assert {name: list(row.against) for name, row in ROWS.items()} == {
        "standard": [],
        "standard+sc": ["standard"],
        "cot": ["standard"],
        "cot+sc": ["standard", "cot"],
        "guided_base": ["standard", "cot"],
        "guided_base+sc": ["standard", "cot+sc", "guided_base"],
        "guided_distilled": ["standard", "cot", "guided_base"],
        "guided_distilled+sc": ["standard", "cot+sc", "guided_base+sc", "guided_distilled"],
        "guided_rejection": ["standard", "cot", "guided_distilled", "guided_base"],
        "guided_rejection+sc": [
            "standard", "cot+sc", "guided_distilled+sc", "guided_base+sc", "guided_rejection",
        ],
        "guided_refined": [
            "standard", "cot", "guided_rejection", "guided_distilled", "guided_base",
        ],
        "guided_refined+sc": [
            "standard", "cot+sc", "guided_rejection+sc", "guided_distilled+sc", "guided_base+sc",
            "guided_refined",
        ],
        "rationale_only_base": ["standard", "cot", "guided_base"],
        "rationale_only_base+sc": ["standard", "cot+sc", "guided_base+sc", "rationale_only_base"],
        "rationale_only_distilled": [
            "standard", "cot", "guided_distilled", "rationale_only_base", "small_alone",
        ],
        "rationale_only_distilled+sc": [
            "standard", "cot+sc", "guided_distilled+sc", "rationale_only_base+sc", "small_alone",
            "rationale_only_distilled",
        ],
        "rationale_only_rejection": [
            "standard", "cot", "guided_rejection", "rationale_only_distilled",
            "rationale_only_base", "small_alone",
        ],
        "rationale_only_rejection+sc": [
            "standard", "cot+sc", "guided_rejection+sc", "rationale_only_distilled+sc",
            "rationale_only_base+sc", "small_alone", "rationale_only_rejection",
        ],
        "rationale_only_refined": [
            "standard", "cot", "guided_refined", "rationale_only_rejection",
            "rationale_only_distilled", "rationale_only_base", "small_alone",
        ],
        "rationale_only_refined+sc": [
            "standard", "cot+sc", "guided_refined+sc", "rationale_only_rejection+sc",
            "rationale_only_distilled+sc", "rationale_only_base+sc", "small_alone",
            "rationale_only_refined",
        ],
        "small_alone": ["standard"],
        "control_empty": ["standard"],
        "control_shuffled": ["standard"],
        "control_masked": ["standard"],
        "control_oracle": ["standard"],
        "rationale_only_empty": ["standard"],
        "rationale_only_masked": ["standard"],
        "rationale_only_oracle": ["standard", "control_oracle"],
    }  # fmt: skip
    assert [row.name for row in ROWS.values() if row.samples_replies] == ["standard+sc", "cot+sc"]
    assert {row.attempts(5) for row in ROWS.values() if row.votes} == {5}
    assert {row.attempts(5) for row in ROWS.values() if not row.votes} == {1}
    points = [(row.colour, row.marker) for row in ROWS.values()]
    assert len(set(points)) == len(points), "each has a point of its own"
    with pytest.raises(LookupError, match="there is no row 'guided': the rows are standard, "):
        find_row("guided")


def test_votes_are_gathered_whatever_the_order() -> None:
    votes = Votes(2)
    unit = {number: Replies([], Usage(asked=number)) for number in range(4)}
    assert votes.add(3, unit[3]) is None
    assert votes.add(0, unit[0]) is None
    assert votes.add(1, unit[1]) == (0, [unit[0], unit[1]])
    assert votes.add(2, unit[2]) == (1, [unit[2], unit[3]])


def test_what_each_control_shows() -> None:
    examples = [EXAMPLE, *(Example(f"q{n}", f"{n}?", "x", (PASSAGE,)) for n in (2, 3, 4))]
    greedy = {one.id: f"rationale of {one.id}" for one in examples}
    greedy["q1"] = "It lies on the humboldt  river, so: Humboldt River. Humboldt Riverside."

    written = {key: [text] for key, text in greedy.items()}

    def shown(row: str) -> list[str]:
        return [text for [text] in shown_texts(find_row(row), examples, written, 0)]

    assert shown("guided_base") == list(greedy.values())
    assert shown_texts(find_row("cot"), examples, {}, 0) == [[]] * 4
    several = {key: [text, "another"] for key, text in greedy.items()}
    assert shown_texts(find_row("guided_base+sc"), examples, several, 0) == list(several.values())
    assert set(shown("control_empty")) == {""}
    for one in ("base", "empty", "oracle", "masked"):
        same = "guided_base" if one == "base" else f"control_{one}"
        assert shown(f"rationale_only_{one}") == shown(same)
        assert find_row(f"rationale_only_{one}").prompt == "rationale_only"
    assert shown("control_oracle") == ["Elko lies on the Humboldt River.", "", "", ""]
    assert shown("control_masked")[0] == "It lies on the ___, so: ___. Humboldt Riverside."
    others = shown("control_shuffled")
    assert sorted(others) == sorted(greedy.values())
    assert all(mine != other for mine, other in zip(greedy.values(), others, strict=True))
    assert masked("C++ (2011) it is", ["C++ (2011)"]) == "___ it is"
    assert masked("Whatever.", [""]) == "Whatever."
    both = masked("The State of Velm, or velm; Velmland.", ["Velm", "State of Velm"])
    assert both == "The ___, or ___; Velmland."
    assert (
        masked("It is a lake. So the answer is A.", ["A"]) == "It is a lake. So the answer is ___."
    )


def test_questions_that_do_not_allow_a_row() -> None:
    without = Example("q2", "?", "x", (PASSAGE,))
    check_rows(["control_oracle", "control_shuffled"], [EXAMPLE, without])
    for named, examples, reason in (
        (["standard"], [], "holds no questions"),
        (["control_shuffled"], [EXAMPLE], "needs another question"),
        (["control_oracle"], [without], "needs supporting facts"),
        (["standard"], [EXAMPLE, without, EXAMPLE], "several questions of the id 'q1'"),
    ):
        with pytest.raises(UserError, match=reason):
            check_rows(named, examples)


def test_what_was_learnt_from_is_no_measure() -> None:
    train = [EXAMPLE, Example("t2", "Who  wrote the Iliad?", "Homer", ())]
    other = Example("v1", "Which town?", "Elko", ())
    same_words = Example("v2", "who wrote Iliad", "Homer", ())
    assert check_overlap(train, [other], allowed=False) is None
    with pytest.raises(UserError, match=r"2 of 3 questions .* \(q1, v2\): .*allow_overlap"):
        check_overlap(train, [EXAMPLE, other, same_words], allowed=False)
    told = check_overlap(train, [EXAMPLE, other, same_words], allowed=True)
    assert told == "2 of 3 questions of data.validation are in data.train too (q1, v2)."


def completion(text: str) -> Completion:
    return Completion(text, 100, 3, "stop")


def said(text: str, answer: str | None = None) -> Answer:
    return Answer(text, text if answer is None else answer, 100, 3)


RATIONALES = Rationales("q1", ["a", "b", "c"], 50, [7, 8, 9], ["eos"] * 3, 0.5)


def test_a_vote_is_scored_by_its_winner() -> None:
    """What failed has no vote; the tokens of all attempts are paid for."""
    attempts = [
        Attempt("It is Reno.", said("Reno")),
        Attempt("Elko lies on the Humboldt River.", said("Humboldt River.")),
        Attempt("So is it.", said("the humboldt river")),
        Attempt("x", DOWN),
    ]
    found = predict(EXAMPLE, attempts, RATIONALES, own=True, cached=1.0, seconds=2.0)
    assert (found.answer, found.em, found.share) == ("Humboldt River.", 1.0, 2 / 3)
    assert found.rationale == "Elko lies on the Humboldt River."
    assert found.contains_gold is True
    assert (found.large_lm_tokens_in, found.large_lm_tokens_out) == (300, 9)
    assert (found.small_lm_tokens_in, found.small_lm_tokens_out) == (50, 24)
    assert (found.requests, found.cached_requests, found.seconds) == (4, 1.0, 2.5)
    answers = ["Reno", "Humboldt River.", "the humboldt river", ""]
    assert [one["answer"] for one in found.votes] == answers
    assert found.votes[3]["reply"] == "the endpoint is down"
    assert (found.failure, found.type) == (None, "bridge")


def test_a_question_fails_if_all_its_attempts_do() -> None:
    found = predict(EXAMPLE, [Attempt("", DOWN)], None, own=False, cached=0, seconds=1.0)
    assert (found.failure, found.em, found.requests) == ("the endpoint is down", 0.0, 1)
    assert (found.contains_gold, found.copied, found.votes) == (None, None, [])


def test_the_best_right_answer_counts_and_all_are_kept() -> None:
    example = replace(EXAMPLE, answer="Velm", aliases=("State of Velm", "Velmland"))
    attempt = Attempt("It lies in Velmland.", said("the State of Velm"))
    found = predict(example, [attempt], RATIONALES, own=True, cached=0, seconds=0.0)
    assert (found.em, found.f1, found.inclusion, found.contains_gold) == (1, 1, 1, True)
    assert (found.gold, found.golds) == ("Velm", ["Velm", "State of Velm", "Velmland"])


def test_answers_that_are_missing_are_counted_and_told() -> None:
    example = Example("q", "?", "Velm", ())

    def predicted(reply: Completion) -> Prediction:
        attempts = answers_of([], [reply], example.question)
        return predict(example, attempts, None, own=False, cached=0, seconds=0.0)

    found = [
        predicted(Completion("Velm", 1, 1, "stop")),
        predicted(Completion("Parrow", 1, 1, "stop")),
        predicted(Completion("", 1, 9, "stop", "Hm.")),
        predicted(Completion("", 1, 9, "length", "Hm. So")),
        predicted(Completion("It is, as far as can be told from", 1, 9, "length")),
        # It was said, whatever came after.
        predicted(Completion("Parrow. It is", 1, 9, "length")),
        predicted(Completion("Velm", 1, 9, "length")),
    ]
    assert [one.missing for one in found] == ["", "", "empty", "cut", "cut", "", ""]
    assert [one.em for one in found] == [1, 0, 0, 0, 0, 0, 1]
    row = row_result("standard", "", found, large=None, small=1)
    assert (row.empty, row.cut, len(row.em)) == (1, 2, 7)
    told = lacking_answers("standard", found)
    assert "standard: 3 of 7 questions" in told
    assert "(1 empty, 2 cut" in told
    assert "raise frozen.max_answer_tokens" in told
    assert "raise frozen.max_thinking_tokens or switch the model's thinking off" in told
    assert "special tokens" not in told
    assert "raise frozen.max_rationale_tokens" in lacking_answers("cot+sc", found)
    assert lacking_answers("standard", found[:2]) == ""
    # Padding alone, as a model writes that was never trained: nothing thinks.
    told = lacking_answers("standard", [predicted(Completion("", 1, 9, "length"))])
    assert "check that the frozen LM and prompts.templates fit each other" in told
    assert "think" not in told


def test_votes_that_never_differ_are_told() -> None:
    def predicted(*replies: Completion | Failure, shown: Sequence[str] = ()) -> Prediction:
        attempts = answers_of(shown, replies, EXAMPLE.question)
        return predict(EXAMPLE, attempts, None, own=False, cached=0, seconds=0.0)

    alike = predicted(completion("Velm"), completion("Velm"), completion("Velm"))
    differs = predicted(completion("Velm"), completion("Velm."), completion("Velm"))
    told = alike_votes("standard+sc", [alike] * 19 + [differs])
    assert "standard+sc: for 19 of 20 questions all votes are the same" in told
    assert "some servers ignore the temperature" in told
    assert alike_votes("standard+sc", [alike] * 18 + [differs] * 2) == ""
    # The same answer from different rationales is what a vote hopes for.
    reasons = predicted(completion("Velm"), completion("Velm"), shown=["One.", "Two."])
    assert alike_votes("guided_base+sc", [reasons]) == ""
    same = predicted(completion("Velm"), completion("Velm"), shown=["One.", "One."])
    assert "the small LM is that sure" in alike_votes("guided_base+sc", [same])
    assert alike_votes("standard", [predicted(completion("Velm"))]) == ""
    assert alike_votes("standard+sc", [predicted(DOWN, DOWN)]) == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Velm", "Velm"),
        ("A lake is in Oster.\n\nOster is in Velm.\n\nSo the answer is Velm.", "Velm"),
        ("A lake is in Oster.\n\nOster is in Velm.", ""),
    ],
)
def test_a_reply_that_is_the_answer_counts_and_reasoning_without_one_has_none(
    text: str, answer: str
) -> None:
    """One rule for all rows: the reading does not know which row it is of."""
    [attempt] = answers_of([], [Completion(text, 1, 1, "stop")], EXAMPLE.question)
    assert isinstance(attempt.answer, Answer)
    assert attempt.answer.extracted == answer


def test_half_an_answer_wins_no_vote() -> None:
    cut = Rationales("q1", ["So the answer is 195"] * 3 + ["So the answer is 1950."], 5, [9] * 4,
                     ["length"] * 3 + ["eos"], 0.5)  # fmt: skip
    attempts = [Attempt(text, said(text.split()[-1].rstrip("."))) for text in cut.texts]
    found = predict(EXAMPLE, attempts, cut, own=True, cached=0, seconds=0.0)
    assert (found.answer, found.share) == ("1950", 0.25)


def test_the_small_lm_alone_asks_nobody() -> None:
    attempt = Attempt("So the answer is Reno.", Answer("", "Reno", 0, 0))
    found = predict(EXAMPLE, [attempt], RATIONALES, own=True, asked=False, cached=0, seconds=0.0)
    assert (found.answer, found.requests, found.large_lm_tokens_in) == ("Reno", 0, 0)
    assert found.reply == ""


def test_copied_is_what_stands_in_eight_words_in_a_row() -> None:
    passage = "One two three four five six seven eight nine ten."
    copied = "two three, four five six seven eight nine and then"
    assert copied_share(copied, [passage]) == 0.8
    assert copied_share("The Two three four five six seven eight", [passage]) == 0.0, "seven only"
    assert copied_share("", [passage]) == copied_share("a word", []) == 0.0
    assert copied_share("one two", [passage], run=2) == 1.0


def prediction(key: str, answer: str = "x") -> Prediction:
    example = Example(key, "?", "x", ())
    attempt = Attempt("", said(answer))
    return predict(example, [attempt], None, own=False, cached=0, seconds=0.0)


def test_a_row_of_one_answer_is_told() -> None:
    asked = [replace(prediction(f"q{n}", "yes"), gold="yes" if n % 2 else "no") for n in range(10)]
    assert one_answer("standard", asked).startswith("standard: all 10 answers are 'yes', so its ")
    assert one_answer("standard", asked[:9]) == "", "few may be alike by chance"
    assert one_answer("standard", [*asked, prediction("q10", "no")]) == ""
    assert one_answer("standard", [replace(one, gold="yes") for one in asked]) == ""


def test_what_is_kept_survives_a_kill_and_is_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cot.jsonl"
    kept = Kept(path, "mark")
    kept.add([prediction("b")])
    kept.add([prediction("a")], seconds=3.0)
    with path.open("ab") as file:
        file.write(b'{"id": "c", "answer": "cut of')
    again = Kept(path, "mark")
    assert list(again.records) == ["b", "a"]
    assert Prediction(**again.records["b"]) == prediction("b")
    assert again.records["a"]["seconds"] == 3.0
    again.add([prediction("c")])
    again.finish(["a", "b", "c", "never asked"])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    other = Kept(path, "another mark")
    assert (other.records, other.dropped) == ({}, 3)
    other.add([prediction("a", "y")])
    assert [json.loads(line)["made_with"] for line in path.open()] == ["another mark"]
    assert asdict(prediction("a", "y"))["em"] == 0.0


def test_tokens_that_were_estimated_are_known_as_such() -> None:
    counted = said("x")
    guessed = replace(counted, estimated=True)
    for replies, expected in ([counted], False), ([counted, guessed], True):
        attempts = [Attempt("", one) for one in replies]
        found = predict(EXAMPLE, attempts, None, own=False, cached=0, seconds=0.0)
        assert found.estimated is expected


def test_the_frontier_is_what_nothing_cheaper_matches() -> None:
    points = {
        "dear": (100.0, 60.0), "good": (40.0, 50.0), "as good and dearer": (50.0, 50.0),
        "worse": (90.0, 55.0), "free": (0.0, 20.0), "as dear as good": (40.0, 45.0),
    }  # fmt: skip
    assert frontier(points) == ["free", "good", "worse", "dear"]
    assert frontier({}) == []
    assert frontier({"a": (1.0, 0.0), "b": (1.0, 0.0)}) == ["a"]


def test_costs_by_hand() -> None:
    """7 large and 2 small parameters. Guided: 2 (7 * 20 + 2 * 30) = 400; cot: 2 * 7 * 50 = 700."""
    tokens = (
        "large_lm_tokens_in",
        "large_lm_tokens_out",
        "small_lm_tokens_in",
        "small_lm_tokens_out",
    )

    def row(*counts: int, requests: int = 4) -> dict[str, float]:
        rest = {"requests": requests, "cached_requests": 1, "seconds": 2.0}
        return {**dict(zip(tokens, counts, strict=True)), **rest}

    assert flops(7, 20, 2, 30) == 400
    assert flops(None, 20, 2, 30) is None
    assert flops(None, 0, 2, 30) == 120
    rows = {"cot": row(120, 80, 0, 0), "guided_base": row(72, 8, 80, 40), "long": row(400, 0, 4, 4)}
    found = costs(rows, 2, 7, dict.fromkeys(rows, 4))
    assert "of_standard" not in found["rows"]["cot"], "there is no such row"
    guided = found["rows"]["guided_base"]
    assert (guided["flops"]["7"], guided["of_cot"]["7"]) == (400, 400 / 700)
    assert guided["break_even"] == 2.0, "2 * 30 / (50 - 20): at 2 parameters both cost 200"
    assert (guided["requests"], guided["cached_requests"], guided["seconds"]) == (1, 0.25, 0.5)
    assert found["rows"]["long"]["break_even"] is None
    assert "of_cot" not in found["rows"]["cot"]
    assert break_even(10, 30, 50, 50) is None
    found = costs(
        {**rows, "standard": row(100, 20, 0, 0)}, 2, 7, dict.fromkeys(rows, 4) | {"standard": 4}
    )
    guided = found["rows"]["guided_base"]
    assert guided["of_standard"]["7"] == 400 / (2 * 7 * 30)
    assert (guided["break_even"], guided["break_even_of_standard"]) == (2.0, 6.0)
    assert "of_standard" not in found["rows"]["standard"]
    assert [size_in_words(n) for n in (134_515_008, 7e9, 1.5e12, 12_000, 40)] == [
        "135M", "7B", "1.5T", "12K", "40",
    ]  # fmt: skip
