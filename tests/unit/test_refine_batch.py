"""What enters a PPO batch: judged rationales only, and enough of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.config import GuidanceRewards, RefineSettings
from lmcot.errors import UserError
from lmcot.records import Failure, FailureKind, Judgement, Rollout
from lmcot.stages.refine import check_staleness, score
from lmcot.stages.summary import rollout_records, step_metrics

GOOD = Judgement({"em": 1.0, "f1": 1.0, **{f"aspect/{name}": 0.5 for name in (
    "factuality", "relevance", "logicality", "consistency", "coherence", "fluency",
    "naturalness", "readability",
)}})  # fmt: skip
FAILED = Judgement(failure=Failure(FailureKind.TRANSIENT, "the endpoint hangs"))


def rollouts(count: int) -> list[Rollout]:
    return [
        Rollout("u", "q", k, (1, 2), (3, 4), (-0.1, -0.2), "eos", "text", 0) for k in range(count)
    ]


def run(**refine: float) -> Any:
    config = SimpleNamespace(
        refine=RefineSettings.model_validate(refine),
        rewards=GuidanceRewards(),
        policy=SimpleNamespace(max_new_tokens=4),
    )
    return SimpleNamespace(config=config)


def test_a_failed_judgement_never_enters_a_batch() -> None:
    """[16] It is left out and counted, and its record has no reward."""
    sampled, judged = rollouts(4), [GOOD, FAILED, GOOD, FAILED]
    scored = score(run(), sampled, judged)
    assert [one.rollout.sample for one in scored] == [0, 2]
    assert [one.reward for one in scored] == [1.0, 1.0]
    metrics = step_metrics(sampled, judged, scored)
    assert metrics["batch/judged_share"] == 0.5
    assert metrics["batch/failed"] == 2.0
    assert metrics["reward/mean"] == 1.0, "failures are not rewards of zero"
    records = rollout_records(sampled, judged, scored)
    assert [record["reward"] for record in records] == [1.0, None, 1.0, None]


def test_penalties_are_taken_from_the_reward_and_logged() -> None:
    """Of judged rationales only: what was not judged has no reward to take them from."""
    short, long = rollouts(2)
    long = replace(long, response_ids=(3, 4, 5, 6), finish_reason="length")
    settings = run(missing_end_penalty=0.25, length_penalty=0.5)
    scored = score(settings, [short, long, long], [GOOD, GOOD, FAILED])
    assert [one.reward for one in scored] == [1.0, 1.0 - 0.25 - 0.5]
    metrics = step_metrics([short, long, long], [GOOD, GOOD, FAILED], scored)
    assert metrics["penalty/missing_end"] == 0.125
    assert metrics["penalty/length"] == 0.25
    assert metrics["reward/mean"] == 0.625
    assert metrics["component/em"] == 1.0


def test_a_step_without_any_judgement_ends_the_run() -> None:
    with pytest.raises(UserError, match=r"none of a step's 2 .*the endpoint hangs"):
        score(run(), rollouts(2), [FAILED, FAILED])


def test_what_a_policy_too_old_sampled_is_refused() -> None:
    """[27] A rationale bears its version; one beyond the bound never enters a batch."""
    sampled = [replace(one, policy_version=3) for one in rollouts(2)]
    check_staleness(sampled, 3, 0)
    check_staleness(sampled, 5, 2)
    for version, limit in ((4, 0), (6, 2), (2, 2)):
        with pytest.raises(RuntimeError, match=r"sampled by policy version 3, .*max_staleness"):
            check_staleness(sampled, version, limit)
