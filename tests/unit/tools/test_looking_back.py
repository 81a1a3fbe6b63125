"""`lmcot compare` and `lmcot inspect`, on run directories that the project's own writers made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmcot.actors.reward_actor import outcome
from lmcot.cli import main
from lmcot.config import dump_config, load_config
from lmcot.errors import UserError
from lmcot.evaluation.predictions import Attempt, predict, row_result
from lmcot.evaluation.report import write_report
from lmcot.evaluation.store import Kept
from lmcot.monitor.metrics import Monitor
from lmcot.records import Answer, Example, Failure, FailureKind, Judgement, Rollout
from lmcot.tools.compare import compare
from lmcot.tools.show import parse_steps

TOY = Path(__file__).parents[3] / "configs" / "toy.yaml"
QUESTIONS = [Example(f"q{n}", f"Question {n}?", "red", ()) for n in range(8)]


def evaluated(folder: Path, rows: dict[str, str], *overrides: str, first: int = 0) -> Path:
    """A run whose rows give "red" where their text has a 1."""
    results = {}
    for row, right in rows.items():
        predictions = []
        for example, mark in zip(QUESTIONS[first:], right[first:], strict=True):
            answer = "red" if mark == "1" else "blue"
            attempt = Attempt(f"It is {answer}, by {row}.", Answer(answer, answer, 90, 2))
            predictions.append(predict(example, [attempt], None, own=True, cached=0, seconds=0.1))
        Kept(folder / "predictions" / f"{row}.jsonl", "mark").add(predictions)
        results[row] = row_result(row, row, predictions, large=7, small=1)
    write_report(folder, results, settings={}, bootstrap_samples=200, confidence=0.95, seed=0)
    (folder / "config.yaml").write_text(
        dump_config(load_config(TOY, list(overrides))), encoding="utf-8"
    )
    return folder


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluated(tmp_path / "one", {"standard": "11000000", "guided_refined": "11110000"})
    two = evaluated(tmp_path / "two", {"guided_refined": "11111110"}, "refine.steps=7", "seed=3")
    files = {"markdown": tmp_path / "c.md", "output": tmp_path / "c.json"}
    found = compare([one, two], **files)
    assert found["settings"] == {"seed": [0, 3], "refine.steps": [90, 7]}
    (test,) = found["tests"]
    assert (test["run"], test["row"], test["n"]) == (str(two), "guided_refined", 8)
    assert test["em"]["difference"] == 37.5, "the second run less the first"
    assert test["em"]["mcnemar"] == 0.25
    assert found["rows"]["standard"][1] is None
    printed = capsys.readouterr().out
    assert "| `guided_refined` | 50.0 [" in printed
    assert "| `guided_refined` | B - A | 8 | +37.5 [" in printed
    assert "| `refine.steps` | `90` | `7` |" in printed
    assert (tmp_path / "c.md").read_text(encoding="utf-8") == printed
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == found


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", {"standard": "11000000"})
    with pytest.raises(UserError, match="needs two runs"):
        compare([one])
    with pytest.raises(UserError, match=r"no evaluation to compare .*lmcot evaluate --run-dir"):
        compare([one, tmp_path / "none"])
    part = evaluated(tmp_path / "part", {"standard": "11000000"}, first=5)
    (test,) = compare([one, part])["tests"]
    assert test["n"] == 3, "paired on what both were asked"
    path = part / "predictions" / "standard.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"id": "q', '"id": "other'), encoding="utf-8")
    with pytest.raises(UserError, match="their 8 and 3 questions have none in common"):
        compare([one, part])
    path.write_text(text.replace("Question 6", "Question six"), encoding="utf-8")
    with pytest.raises(UserError, match=r"other data: question q6 is \('Question 6\?'"):
        compare([one, part])
    path.write_text('{"id": "q1"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="damaged, or of another version"):
        compare([one, part])


def refined(folder: Path) -> Path:
    """A run of three steps; the question of the first comes again in the third."""
    config = load_config(TOY)
    down = Failure(FailureKind.TRANSIENT, "the endpoint is down")
    with Monitor(folder) as monitor:
        for step, key, text in (
            (1, "q0", "Red is a colour of the flag."),
            (2, "q1", "Nothing \x1b[2J is known."),
            (3, "q0", "Red is the only colour of the flag."),
        ):
            example = QUESTIONS[int(key[1])]
            rollouts = [
                Rollout("u", key, k, (1,), (2, 3), (-0.1, -0.2), "eos", f"{text} {k}", step - 1)
                for k in range(3)
            ]
            judgements = [
                Judgement({"increasing": 0.25 * k}, Answer("Red.", "red", 9, 2)) for k in range(2)
            ]
            judged = outcome([example], rollouts, [*judgements, Judgement(failure=down)], config)
            monitor.rollouts(step, judged.records)
    with (folder / "rollouts" / "step-000003.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"cut sho')
    return folder


def inspect(run: Path, *options: str) -> int:
    return main(["inspect", str(run), *options])


def test_the_last_step_beside_what_came_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = refined(tmp_path)
    assert inspect(run) == 0
    said = capsys.readouterr().out
    assert said.count("step 3, q0, sample") == 3
    assert "Question: Question 0?" in said
    assert "Answer: red  [gold: red]" in said
    assert "first at step 1, reward 0 ([-gone-], {+new+}):" in said
    assert "Red is [-a-] {+the only+} colour of the flag. 0" in said
    assert "Failed: the endpoint is down" in said
    assert "increasing 0.25" in said
    assert inspect(run, "--step", "1-3", "--order", "best", "--limit", "1") == 0
    assert "step 1, q0, sample 1: reward 0.25 (2 tokens" in capsys.readouterr().out
    assert inspect(run, "--step", "1-2", "--question", "question 1") == 0
    said = capsys.readouterr().out
    assert said.count("step 2, q1") == 3
    assert "\x1b" not in said, "a policy must not move the cursor"


def test_the_rounds_of_rejection_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = refined(tmp_path)
    assert inspect(run, "--rejection") == 2
    assert "no rationales of rejection sampling" in capsys.readouterr().err
    (run / "reject").mkdir()
    for number in (1, 2):
        lines = (run / "rollouts" / f"step-{number:06d}.jsonl").read_text().splitlines()
        records = [{**json.loads(line), "kept": False, "reason": "too dull"} for line in lines]
        text = "".join(json.dumps(one) + "\n" for one in records)
        (run / "reject" / f"round-{number}.jsonl").write_text(text)
        (run / "reject" / f"round-{number}.judged.jsonl").write_text("not a round's result")
    assert inspect(run, "--rejection", "--limit", "1") == 0
    said = capsys.readouterr().out
    assert "round 2, q" in said
    assert "Rejected: too dull" in said
    assert inspect(run, "--rejection", "--step", "3") == 2
    assert "it has rounds 1 to 2" in capsys.readouterr().err


def test_for_machines_and_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = refined(tmp_path)
    assert inspect(run, "--json", "--limit", "2") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["step"], line["sample"]) for line in lines] == [(3, 0), (3, 1)]
    assert lines[0]["before"]["step"] == 1
    for options, reason in (
        (("--step", "9"), "no such rationale in step 9; it has steps 1 to 3"),
        (("--question", "nobody asked"), "no such rationale"),
        (("--step", "3-1"), "neither a step"),
        (("--limit", "0"), "--limit is 0"),
        (("--evaluation",), "no predictions of two policies"),
    ):
        assert inspect(run, *options) == 2
        assert reason in capsys.readouterr().err
    assert inspect(tmp_path / "none") == 2
    assert "holds no rationales of refinement" in capsys.readouterr().err
    assert (parse_steps("7"), parse_steps("3-9")) == (range(7, 8), range(3, 10))


def test_what_the_refined_policy_does_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"guided_distilled": "10100000", "guided_refined": "01100000"}
    run = evaluated(tmp_path, rows)
    assert inspect(run, "--evaluation", "--order", "best", "--limit", "1") == 0
    said = capsys.readouterr().out
    assert "q1: Question 1?  [gold: red]" in said
    assert "guided_distilled -> blue  (EM 0, F1 0.00)" in said
    assert "guided_refined -> red  (EM 1, F1 1.00)" in said
    assert "It is [-blue,-] {+red,+} by [-guided_distilled.-] {+guided_refined.+}" in said
    assert inspect(run, "--evaluation", "--order", "worst", "--limit", "1", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["guided_refined"]["id"], found["f1_gained"]) == ("q0", -1.0)


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (["guided_base", "guided_refined", "rationale_only_refined"], "guided_refined ->"),
        (["guided_refined", "rationale_only_base", "rationale_only_distilled"],
         "rationale_only_distilled ->"),
    ],
)  # fmt: skip
def test_policies_are_compared_where_the_frozen_lm_reads_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str], shown: str
) -> None:
    run = evaluated(tmp_path, dict.fromkeys(rows, "10100000"))
    assert inspect(run, "--evaluation", "--limit", "1") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert len(said) == 2
    assert said[1].startswith(shown)
    assert said[0].split("_")[0] == shown.split("_")[0]


def test_rows_that_read_otherwise_are_no_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(tmp_path, dict.fromkeys(["guided_refined", "rationale_only_base"], "10100000"))
    assert inspect(run, "--evaluation") == 2
    assert "holds no predictions of two policies to compare" in capsys.readouterr().err
