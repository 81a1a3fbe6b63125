"""Which questions a group baseline learns nothing from, and by what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from lmcot.actors.reward_actor import outcome
from lmcot.actors.units import Scored
from lmcot.config import GuidanceRewards, IncreasingRewards, SignalFilter, parse_config
from lmcot.records import Example, Failure, FailureKind, GroupResult, Judgement, Rollout
from lmcot.rewards.signal import is_right

FAILED = Judgement(failure=Failure(FailureKind.TRANSIENT, "the endpoint hangs"))
ASPECTS = (
    "factuality", "relevance", "logicality", "consistency", "coherence", "fluency", "naturalness",
    "readability",
)  # fmt: skip


def judgement(em: float, f1: float, fluency: float = 0.5) -> Judgement:
    aspects = {f"aspect/{name}": 0.5 for name in ASPECTS} | {"aspect/fluency": fluency}
    return Judgement({"em": em, "f1": f1, "inclusion": em, **aspects})


RIGHT, HALF, WRONG = judgement(1, 1), judgement(0, 0.5), judgement(0, 0)
FLUENT = judgement(0, 0, fluency=0.9)


def judged(
    groups: list[list[Judgement]],
    signal: SignalFilter | None,
    rewards: Mapping[str, Any] | None = None,
    empty: tuple[int, ...] = (),
) -> Scored:
    """What a unit of so many questions comes to.

    Args:
        empty: numbers of the rationales without a token.
    """
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama", "max_new_tokens": 4},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "prompts": {"demonstrations": 0},
            "rewards": {"aspects": {"fluency": {"weight": 0.5}}, **(rewards or {})},
            "refine": {"start_from": "base"},
        }
    )
    examples = [Example(f"q{number}", "?", "a", ()) for number in range(len(groups))]
    rollouts = [
        Rollout("u", example.id, k, (1,), (2,), (-0.5,), "eos", "x", 0)
        for example, group in zip(examples, groups, strict=True)
        for k in range(len(group))
    ]
    for number in empty:
        rollouts[number] = Rollout("u", rollouts[number].example_id, 0, (1,), (), (), "eos", "", 0)
    flat = [one for group in groups for one in group]
    return outcome(examples, rollouts, flat, config, signal)


def left_out(groups: list[list[Judgement]], by: Any = "task", **rewards: Any) -> list[str]:
    """Why each question is left out."""
    return [one.left_out for one in judged(groups, SignalFilter(by=by), rewards).results]


@pytest.mark.parametrize(
    ("group", "task", "right", "reward"),
    [
        ([RIGHT, WRONG, RIGHT], "", "", ""),
        ([RIGHT, RIGHT, RIGHT], "right", "right", "right"),
        ([WRONG, WRONG, WRONG], "wrong", "wrong", "wrong"),
        ([HALF, HALF, HALF], "equal", "equal", "equal"),
        ([HALF, WRONG, WRONG], "", "equal", ""),
        ([FLUENT, WRONG, WRONG], "wrong", "wrong", ""),
        ([RIGHT, WRONG, FAILED], "", "", ""),
        ([RIGHT, FAILED, RIGHT], "right", "right", "right"),
        ([RIGHT, FAILED, FAILED], "few", "few", "few"),
        ([FAILED, FAILED, FAILED], "few", "few", "few"),
    ],
)
def test_a_question_is_left_out_by_the_measure_that_is_set(
    group: list[Judgement], task: str, right: str, reward: str
) -> None:
    """By default no difference of style between wrong rationales becomes an advantage."""
    assert left_out([group]) == [task]
    assert left_out([group], by="right") == [right]
    assert left_out([group], by="reward") == [reward]


def test_a_penalty_is_part_of_the_whole_reward_alone() -> None:
    """Both rationales are as long as they may be; one of them was cut."""
    signal = SignalFilter(by="reward")
    group, penalty = [[WRONG, WRONG]], {"penalties": {"length": 0.5, "length_free": 0.0}}
    (even,) = judged(group, signal, penalty).results
    assert even.left_out == "wrong"
    (empty,) = judged(group, signal, penalty, empty=(1,)).results
    assert empty.left_out == "few", "a rationale without a token teaches nothing"


def test_what_is_right_follows_from_the_weights() -> None:
    partly = Judgement({"em": 0.0, "f1": 1.0, "inclusion": 1.0})
    for em, inclusion, f1, right in ((1, 1, 1, False), (0, 1, 1, True), (0, 0, 1, True)):
        rewards = GuidanceRewards(em_weight=em, inclusion_weight=inclusion, f1_weight=f1)
        assert is_right(partly, rewards) == right
    custom = GuidanceRewards(em_weight=0, f1_weight=0, custom="a:b")
    assert not is_right(RIGHT, custom), "nothing tells what is right"
    toy = IncreasingRewards(kind="increasing")
    assert is_right(Judgement({"increasing": 1.0}), toy)
    assert not is_right(Judgement({"increasing": 0.8}), toy)


def test_without_weights_of_the_answer_equal_is_equal() -> None:
    rewards = {"em_weight": 0.0, "f1_weight": 0.0}
    groups = [[RIGHT, RIGHT], [WRONG, WRONG], [FLUENT, WRONG]]
    assert left_out(groups, by="reward", **rewards) == ["equal", "equal", ""]


def test_what_is_left_out_is_recorded_but_not_learnt() -> None:
    groups = [[RIGHT, RIGHT], [RIGHT, WRONG], [WRONG, WRONG], [RIGHT, FAILED]]
    found = judged(groups, SignalFilter())
    assert [(one.rollout.example_id, one.rollout.sample) for one in found.scored.open()] == [
        ("q1", 0),
        ("q1", 1),
    ]
    records = [json.loads(line) for line in found.records.splitlines()]
    assert [one.get("left_out") for one in records] == [
        "right", "right", None, None, "wrong", "wrong", "few", "few"
    ]  # fmt: skip
    assert list(found.columns["judged"]) == [1, 1, 1, 1, 1, 1, 1, 0], "all are measured"
    assert found.results == (
        GroupResult(2, 2, 2, "right"),
        GroupResult(2, 2, 1),
        GroupResult(2, 2, 0, "wrong"),
        GroupResult(2, 1, 1, "few"),
    )
    whole = judged(groups, None)
    assert len(whole.scored.open()) == 7
    assert b"left_out" not in whole.records
    assert [(one.judged, one.right) for one in whole.results] == [(2, 2), (2, 1), (2, 0), (1, 1)]
