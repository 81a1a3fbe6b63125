"""The lines of ``rollouts/``: what is written is read again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lmcot.errors import UserError
from lmcot.records import (
    Answer,
    Example,
    Failure,
    FailureKind,
    Judgement,
    Rollout,
    ScoredRollout,
)  # fmt: skip
from lmcot.rollout_log import (
    RECORD_KEYS,
    decode_rows,
    encode_rollouts,
    last_step,
    read_records,
    read_scored,
)  # fmt: skip
from lmcot.run_files import rollouts_name

EXAMPLE = Example("q1", "Which river?", "the Brann", ())
ROLLOUT = Rollout(
    unit_id="step-1/0", example_id="q1", sample=0, prompt_ids=(1, 2), response_ids=(3, 4),
    logprobs=(-0.5, -0.25), finish_reason="eos", text="It is the Brann.", policy_version=0,
)  # fmt: skip
GOOD = Judgement({"em": 1.0}, Answer("the Brann", "the Brann", 10, 3), contains_gold=True)
FAILED = Judgement(failure=Failure(FailureKind.TRANSIENT, "late"))
SCORED = ScoredRollout(ROLLOUT, GOOD, 0.75, {"penalty/length": 0.25})


def _lines() -> bytes:
    return encode_rollouts([ROLLOUT] * 2, [FAILED, GOOD], [None, SCORED], {"q1": EXAMPLE})


def test_judged_rollouts_are_read_as_they_were(tmp_path: Path) -> None:
    (tmp_path / rollouts_name(1)).write_bytes(_lines())
    assert read_scored(tmp_path, 1) == [SCORED]
    assert last_step(tmp_path) == 1


def test_lines_without_penalties_are_read_too(tmp_path: Path) -> None:
    records = [json.loads(line) for line in _lines().splitlines()]
    for record in records:
        del record["penalties"]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / rollouts_name(1)).write_text(text)
    assert read_scored(tmp_path, 1) == [ScoredRollout(ROLLOUT, GOOD, 0.75)]


def test_each_line_stands_alone() -> None:
    failed, judged = decode_rows(_lines(), [0, 1])
    assert judged["question"] == "Which river?"
    assert judged["gold"] == "the Brann"
    assert judged["reward"] == 0.75
    assert judged["penalties"] == {"penalty/length": 0.25}
    assert failed["reward"] is None
    assert failed["judgement"]["failure"]["reason"] == "late"
    assert set(RECORD_KEYS) <= set(judged)


def test_numbers_that_are_not_finite_are_null() -> None:
    judgement = Judgement({"em": math.nan, "f1": math.inf})
    scored = ScoredRollout(ROLLOUT, judgement, 0.0)
    (record,) = decode_rows(encode_rollouts([ROLLOUT], [judgement], [scored], {"q1": EXAMPLE}), [0])
    assert record["judgement"]["components"] == {"em": None, "f1": None}


def test_a_last_line_that_was_cut_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / rollouts_name(1)
    path.write_bytes(_lines()[:-20])
    assert len(list(read_records(path, RECORD_KEYS))) == 1
    path.write_bytes(b"{}\n" + _lines())
    with pytest.raises(UserError, match=r"line 1 of .* is damaged"):
        list(read_records(path, RECORD_KEYS))


def test_a_folder_without_rollouts_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no rationales"):
        last_step(tmp_path)
    with pytest.raises(UserError, match="rationales of step 3 cannot be read"):
        read_scored(tmp_path, 3)
