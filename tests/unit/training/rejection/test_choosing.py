"""Which sampled rationales are kept, and what is counted of them."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.config import parse_config
from lmcot.config.reject import RejectSettings
from lmcot.errors import UserError
from lmcot.records import Example
from lmcot.training.filters import MERELY_THE_ANSWER, Filters
from lmcot.training.reasons import NEAR_DUPLICATE, RIGHT
from lmcot.training.rejection.choosing import (
    CUT,
    EMPTY,
    NO_ANSWER,
    OTHERS_ARE_BETTER,
    UNASKED,
    WRONG,
    choose,
    decided,
    pass_at,
)
from lmcot.training.rejection.files import Record
from lmcot.training.rejection.gathering import round_metrics

EXAMPLE = Example("q", "Where is the tower?", "Velm", ())
TEXT = "The tower stands in the old town of Velm. So the answer is Velm."


def record(
    text: str = TEXT,
    answer: str | None = "Velm",
    reward: float | None = 1.0,
    *,
    question: str = "q",
    sample: int = 0,
    tokens: int = 9,
    **changes: Any,
) -> Record:
    """A line as the reward actors write it."""
    said = None if answer is None else {"extracted": answer}
    failure = {"kind": "transient", "reason": "no reply"} if reward is None else None
    return {
        "example_id": question, "sample": sample, "text": text, "response_ids": [1] * tokens,
        "prompt_ids": [1], "logprobs": [0.0], "finish_reason": "eos", "reward": reward,
        "judgement": {"answer": said, "failure": failure}, **changes,
    }  # fmt: skip


def settings(**values: Any) -> RejectSettings:
    return RejectSettings(**{"samples": 4, **values})


def reason(one: Record, **values: Any) -> str:
    chosen = settings(**values)
    found = decided(EXAMPLE, one, chosen, Filters(chosen.filters, lambda text: True), ())
    assert found["kept"] == (found["reason"] in (RIGHT, UNASKED))
    assert "prompt_ids" not in found
    return str(found["reason"])


def test_each_rationale_is_kept_or_rejected_with_a_reason() -> None:
    assert reason(record()) == RIGHT
    assert reason(record(answer="Sarn")) == WRONG
    assert reason(record(answer="")) == NO_ANSWER
    assert reason(record(answer=None)) == UNASKED
    assert reason(record(reward=None)) == "failed: no reply"
    assert reason(record(text="So the answer is Velm.")) == MERELY_THE_ANSWER
    assert reason(record(finish_reason="length")) == CUT
    assert reason(record(text=" ")) == EMPTY


def test_what_is_right_is_a_setting() -> None:
    half = record(answer="old Velm")  # F1 2/3
    assert reason(half) == WRONG
    assert reason(half, min_f1=0.66) == RIGHT
    assert reason(half, min_f1=0.67) == WRONG
    assert reason(half, right_by="inclusion") == RIGHT
    assert reason(half, right_by="em", min_f1=0.1) == WRONG


def chosen(records: list[Record], learnt: tuple[str, ...] = (), **values: Any) -> dict[Any, str]:
    """The reason of each sample of each question; empty for what is kept."""
    options = settings(**values)
    filters = Filters(options.filters, lambda text: True)
    lines = [decided(EXAMPLE, one, options, filters, ()) for one in records]
    examples = [Example(name, "?", "Velm", ()) for name in ("q", "r")]
    found = choose(examples, lines, options, learnt)
    order = [(one["example_id"], one["sample"]) for one in found]
    assert order == sorted(order)
    return {
        (one["example_id"], one["sample"]): "" if one["kept"] else one["reason"] for one in found
    }


def told(of: str) -> str:
    return f"The tower of {of} stands near the {of} gate, in {of}. So the answer is Velm."


def test_the_right_ones_with_the_highest_reward_are_kept() -> None:
    records = [
        record(told("Sarn"), reward=0.4, sample=3),
        record(told("Orl"), reward=0.9, sample=1),
        record(told("Teth"), reward=2.0, sample=2, answer="Sarn"),
        record(told("Lun"), reward=0.7, sample=0),
    ]
    assert chosen(records) == {
        ("q", 0): OTHERS_ARE_BETTER, ("q", 1): "", ("q", 2): WRONG, ("q", 3): OTHERS_ARE_BETTER,
    }  # fmt: skip
    assert [why for why in chosen(records, keep=2).values() if not why] == ["", ""]
    assert chosen(records, keep=2)["q", 3] == OTHERS_ARE_BETTER


def test_of_equal_rewards_the_shortest_is_kept() -> None:
    records = [record(told("Sarn"), sample=0, tokens=9), record(told("Orl"), sample=1, tokens=8)]
    assert chosen(records) == {("q", 0): OTHERS_ARE_BETTER, ("q", 1): ""}


def test_what_is_learnt_anyway_is_not_kept_again() -> None:
    """A near-duplicate leaves its place to the next best one."""
    records = [
        record(told("Sarn"), reward=0.9, sample=0),
        record(told("Orl"), reward=0.5, sample=1),
        record(told("Orl"), reward=0.5, question="r"),
    ]
    assert chosen(records, (told("Sarn"),)) == {
        ("q", 0): NEAR_DUPLICATE, ("q", 1): "", ("r", 0): NEAR_DUPLICATE,
    }  # fmt: skip
    alone = chosen(records, (told("Sarn"),), filters={"near_duplicates": None})
    assert alone == {("q", 0): "", ("q", 1): OTHERS_ARE_BETTER, ("r", 0): ""}


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    """Of 4 samples 1 is right: a pair holds it in 3 of 6 cases."""
    assert pass_at([1], 4, 1) == 0.25
    assert pass_at([1], 4, 2) == 0.5
    assert pass_at([1, 0, 4], 4, 2) == pytest.approx((0.5 + 0 + 1) / 3)
    assert pass_at([1, 0], 4, 4) == 0.5
    assert pass_at([3], 4, 2) == 1.0


def test_a_round_is_counted() -> None:
    options = settings(samples=2)
    filters = Filters(options.filters, lambda text: True)
    examples = [Example(name, "?", "Velm", ()) for name in ("q", "r", "s")]
    lines = [
        record(told("Sarn"), reward=0.5, sample=0),
        record(told("Orl"), reward=0.1, sample=1, answer="Sarn", finish_reason="length"),
        record(told("Lun"), reward=0.3, question="r", answer=""),
        record(told("Teth"), reward=0.3, question="r", sample=1, answer="Sarn"),
        record(told("Ulm"), reward=0.8, question="s"),
        record(told("Ulm"), reward=None, question="s", sample=1),
    ]
    records = choose(
        examples, [decided(EXAMPLE, one, options, filters, ()) for one in lines], options
    )
    found = round_metrics(examples, records, options)
    assert found["rejection/sampled"] == 6
    assert found["rejection/kept"] == 2
    assert found["rejection/solved_share"] == found["rejection/kept_share"] == pytest.approx(2 / 3)
    # 's' is left out of these: one of its two samples could not be judged.
    assert found["rejection/pass_at_1"] == 0.25
    assert found["rejection/pass_at_2"] == 0.5
    assert "rejection/pass_at_4" not in found
    assert found["reward/mean"] == pytest.approx((0.5 + 0.1 + 0.3 + 0.3 + 0.8) / 5)
    assert found["rejection/reward_kept"] == pytest.approx(0.65)
    assert found["response/cut_share"] == pytest.approx(1 / 6)
    assert found["batch/failed"] == 1
    none = round_metrics(examples, [{**one, "kept": False} for one in records], options)
    assert "rejection/reward_kept" not in none, "a mean of none would raise the alarm not_finite"


BASE = {
    "data": {"train": {"kind": "sample", "split": "train"},
             "validation": {"kind": "sample", "split": "validation"}},
    "policy": {"source": "random:t5"},
    "frozen": {"backend": "transformers", "source": "random:t5"},
}  # fmt: skip
TEACHER = {"kind": "supporting_facts"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reject": {"samples": 1}, "teacher": TEACHER}, "samples"),
        (
            {"reject": {"samples": 2, "keep": 3}, "teacher": TEACHER},
            "keep is 3, but a question has",
        ),
        ({"reject": {}, "refine": {"start_from": "base"}}, "no 'teacher' to distil from"),
        (
            {"reject": {"start_from": "base"}, "refine": {"start_from": "base"}},
            "reject.teacher_rationales is true, but there is no 'teacher'",
        ),
        (
            {"teacher": TEACHER, "refine": {"start_from": "rejection"}},
            "refine.start_from is 'rejection', but there is no 'reject' section",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({**BASE, **values})
