"""What enters a PPO batch: judged rationales only, and enough of them."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from lmcot.actors.reward_actor import outcome
from lmcot.actors.units import Scored
from lmcot.config import Config, parse_config
from lmcot.errors import UserError
from lmcot.records import (
    Columns,
    Example,
    Failure,
    FailureKind,
    Judgement,
    Paragraph,
    Rollout,
    ScoredRollout,
    SupportingFact,
)
from lmcot.rewards.scoring import columns
from lmcot.training.batch import check_judged, check_staleness
from lmcot.training.step_metrics import step_metrics

GOOD = Judgement({"em": 1.0, "f1": 1.0, **{f"aspect/{name}": 0.5 for name in (
    "factuality", "relevance", "logicality", "consistency", "coherence", "fluency",
    "naturalness", "readability",
)}})  # fmt: skip
FAILED = Judgement(failure=Failure(FailureKind.TRANSIENT, "the endpoint hangs"))


def rollouts(count: int) -> list[Rollout]:
    return [
        Rollout("u", "q", k, (1, 2), (3, 4), (-0.1, -0.2), "eos", "Zürich", 0) for k in range(count)
    ]


def settings(penalties: Mapping[str, float] | None = None, **refine: float) -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama", "max_new_tokens": 4},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "prompts": {"demonstrations": 0},
            "rewards": {"penalties": penalties or {}},
            "refine": {"start_from": "base", **refine},
        }
    )


def judge(sampled: list[Rollout], judgements: list[Judgement], config: Config) -> Scored:
    return outcome([Example("q", "Who?", "Zwingli", ())], sampled, judgements, config)


def rewards(judged: Scored) -> list[float]:
    return [one.reward for one in judged.scored.open()]


def records(judged: Scored) -> list[dict[str, object]]:
    return [json.loads(line) for line in judged.records.splitlines()]


def test_a_failed_judgement_never_enters_a_batch() -> None:
    """[16] It is left out and counted, and its record has no reward."""
    judged = judge(rollouts(4), [GOOD, FAILED, GOOD, FAILED], settings())
    assert [one.rollout.sample for one in judged.scored.open()] == [0, 2]
    assert rewards(judged) == [1.0, 1.0]
    assert judged.failures == (FAILED.failure, FAILED.failure)
    metrics = step_metrics(judged.columns, 4)
    assert metrics["batch/judged_share"] == 0.5
    assert metrics["batch/failed"] == 2.0
    assert metrics["reward/mean"] == 1.0, "failures are not rewards of zero"
    assert [one["reward"] for one in records(judged)] == [1.0, None, 1.0, None]


def test_penalties_are_taken_from_the_reward_and_logged() -> None:
    """Of judged rationales only: what was not judged has no reward to take them from."""
    short, long = rollouts(2)
    long = replace(long, response_ids=(3, 4, 5, 6), finish_reason="length")
    config = settings({"missing_end": 0.25, "length": 0.5})
    judged = judge([short, long, long], [GOOD, GOOD, FAILED], config)
    assert rewards(judged) == [1.0, 1.0 - 0.25 - 0.5]
    metrics = step_metrics(judged.columns, 3)
    assert metrics["penalty/missing_end"] == 0.125
    assert metrics["penalty/length"] == 0.25
    assert metrics["reward/mean"] == 0.625
    assert metrics["component/em"] == 1.0
    assert metrics["response/cut_share"] == pytest.approx(2 / 3)


def test_a_step_without_any_judgement_ends_the_run() -> None:
    judged = judge(rollouts(2), [FAILED, FAILED], settings())
    assert step_metrics(judged.columns, 2)["reward/mean"] == 0.0
    with pytest.raises(UserError, match=r"none of a step's 2 .*the endpoint hangs"):
        check_judged(judged.columns, judged.failures)
    check_judged(judge(rollouts(2), [FAILED, GOOD], settings()).columns, judged.failures)


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([[0.5, 0.5, 0.25], [1.0, 1.0, None], [-1.0, 1.0, 0.0]], (-1.0, 1.0, 1 / 3)),
        ([[0.5, None], [None, 0.25], [None, None]], (0.25, 0.5, 0.0)),
        ([[0.5], [0.5]], (0.5, 0.5, 1.0)),
        ([[0.5], [1.0]], (0.5, 1.0, 0.0)),
        ([[0.5, None]], (0.5, 0.5, None)),
    ],
)
def test_questions_whose_rationales_all_have_one_reward(
    questions: list[list[float | None]], expected: tuple[float, float, float | None]
) -> None:
    """Of the judged ones. Where no question has several, they are compared with one another."""
    samples = len(questions[0])
    given = [reward for rewards in questions for reward in rewards]
    sampled = [
        replace(one, example_id=f"q{n // samples}") for n, one in enumerate(rollouts(len(given)))
    ]
    judgements = [FAILED if reward is None else GOOD for reward in given]
    scored = [
        None if reward is None else ScoredRollout(one, GOOD, reward)
        for one, reward in zip(sampled, given, strict=True)
    ]
    metrics = step_metrics(columns(sampled, judgements, scored), samples)
    least, most, equal = expected
    assert (metrics["reward/min"], metrics["reward/max"]) == (least, most)
    assert metrics.get("reward/equal_groups") == (equal if equal is None else pytest.approx(equal))


def test_what_a_policy_too_old_sampled_is_refused() -> None:
    """[27] A rationale bears its version; one beyond the bound never enters a batch."""
    sampled = [replace(one, policy_version=3) for one in rollouts(2)]
    numbers = judge(sampled, [GOOD, FAILED], settings()).columns
    check_staleness(numbers, 3, 0)
    check_staleness(numbers, 5, 2)
    for version, limit in ((4, 0), (6, 2), (2, 2)):
        with pytest.raises(RuntimeError, match=r"sampled by policy version 3, .*max_staleness"):
            check_staleness(numbers, version, limit)


def test_records_are_one_json_line_each_whatever_they_hold() -> None:
    """JSON has no word for a NaN: it is null, and the line stays JSON."""
    odd = replace(rollouts(1)[0], logprobs=(-0.5, math.nan), text="two\nlines")
    judged = judge([odd, rollouts(1)[0]], [GOOD, GOOD], settings())
    first, second = records(judged)
    assert first["logprobs"] == [-0.5, None]
    assert first["text"] == "two\nlines"
    assert second["text"] == "Zürich"
    assert (second["question"], second["gold"]) == ("Who?", "Zwingli")
    assert "Zürich".encode() in judged.records
    assert second["judgement"] == {**second["judgement"], "components": GOOD.components}  # type: ignore[dict-item]


def test_units_with_different_columns_are_joined() -> None:
    """A unit of which nothing was judged has no components; NaN stands for them."""
    whole = judge(rollouts(2), [GOOD, FAILED], settings()).columns
    nothing = judge(rollouts(1), [FAILED], settings()).columns
    assert "component/em" not in nothing.names
    for parts in ([whole, nothing], [nothing, whole]):
        joined = Columns.joined(parts)
        assert joined["judged"].tolist() == [x for part in parts for x in part["judged"]]
        assert sorted(joined["component/em"], key=np.isnan)[0] == 1.0
        assert np.isnan(joined["component/em"]).sum() == 2
        assert step_metrics(joined, 1)["component/em"] == 1.0


def test_records_come_back_whole_from_a_pickle() -> None:
    """They have a way of their own, for speed."""
    example = Example(
        "q", "Which?", "Elko", (Paragraph("Elko", ("A town.",)),), (SupportingFact("Elko", 0),)
    )
    scored = judge(rollouts(2), [GOOD, GOOD], settings()).scored.open()
    for record in (example, FAILED, *scored):
        again = pickle.loads(pickle.dumps(record))
        assert again == record
        assert type(again) is type(record)
