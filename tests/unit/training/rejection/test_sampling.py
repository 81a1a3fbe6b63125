"""A round is sampled and judged once, wherever it is killed: on stand-ins of the actors."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.actors.reward_actor import outcome
from lmcot.actors.units import Packed, RolloutUnit, Scored, ScoreUnit
from lmcot.config import BudgetSettings, parse_config
from lmcot.data.prompts import load_templates
from lmcot.data.tasks import EXTRACTIVE_QA
from lmcot.errors import UserError
from lmcot.monitor.metrics import Monitor, read_metrics
from lmcot.records import Answer, Example, Failure, FailureKind, Judgement, Rollout, Usage
from lmcot.run.budgets import Spending
from lmcot.run.directory import RunDirectory
from lmcot.training.pipeline import Fleets
from lmcot.training.rejection import gathering, sampling
from lmcot.training.rejection.files import RoundFiles, key_of

QUESTIONS = [f"q{number}" for number in range(5)]
K = 3
VALUES = {
    "data": {
        "train": {"kind": "sample", "split": "train"},
        "validation": {"kind": "sample", "split": "validation"},
    },
    "policy": {"source": "random:t5"},
    "frozen": {"backend": "transformers", "source": "random:t5"},
    "teacher": {"kind": "supporting_facts"},
    "reject": {"samples": K},
    "rewards": {"em_weight": 1.0, "f1_weight": 0.0},
    "actors": {"prompts_per_unit": 2},
    "failures": {"max_infrastructure_share": 0.5},
}


class Killed(BaseException):
    """The end of a session without notice."""


def text_of(question: str, sample: int) -> str:
    names = " and ".join(f"{question}{sample}{letter}" for letter in "abcde")
    return f"The towers are {names}, it is told. So the answer is Velm."


class Stand:
    """A run of five questions; its actors write down what they were asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.sampled: Counter[tuple[str, int]] = Counter()
        self.judged: Counter[tuple[str, int]] = Counter()
        self.fails: set[tuple[str, int]] = set()
        self.right = {("q0", 1), ("q2", 0), ("q2", 2), ("q4", 2)}
        self.config = parse_config(VALUES)
        monkeypatch.setattr(sampling, "open_fleets", self._open)
        monkeypatch.setattr(sampling, "check_plan", lambda *about: None)
        monkeypatch.setattr(sampling, "wait_for_news", lambda *sources: None)

    def gather(self, learnt: tuple[str, ...] = ()) -> list[Any]:
        """A session that goes through round 1."""
        with RunDirectory(self.folder) as directory, Monitor(self.folder) as monitor:
            run: Any = SimpleNamespace(
                config=self.config,
                task=EXTRACTIVE_QA,
                functions={},
                train=[
                    SimpleNamespace(example=Example(name, f"Where is {name}?", "Velm", ()))
                    for name in QUESTIONS
                ],
                templates=load_templates("default"),
                demonstrations=None,
                directory=directory,
                monitor=monitor,
                spending=Spending(self.folder / "spending.json", BudgetSettings()),
                interruption=SimpleNamespace(check=lambda: None),
                tell_unmeasured=lambda components: None,
            )
            assert self.config.reject is not None
            found = gathering.gather(run, self.config.reject, 1, "a/model", learnt)
            run.spending.save()
            return list(found)

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = (self.folder / "reject" / "round-1.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def _open(self, run: Any, source: str, stack: Any, *, trains: bool) -> Fleets:
        assert (source, trains) == ("a/model", False)
        fleets: Any = SimpleNamespace(
            rollout=FakeFleet(self._sample), reward=FakeFleet(self._judge), frozen=None, all=[],
            wait_ready=lambda: None,
        )  # fmt: skip
        return fleets

    def _sample(self, unit: RolloutUnit) -> Packed[list[Rollout]]:
        found = []
        for example in unit.questions.open():
            for sample in range(unit.samples):
                self.sampled[example.id, sample] += 1
                seed = unit.sample_seed(example.id, sample)
                found.append(
                    Rollout(
                        unit.unit_id, example.id, sample, (1, 2), (seed % 97, 3), (-0.5, -0.1),
                        "eos", text_of(example.id, sample), 0,
                    )
                )  # fmt: skip
        return Packed.of(found)

    def _judge(self, unit: ScoreUnit) -> Scored:
        questions, rollouts = unit.questions.open(), unit.rollouts.open()
        keys = [(one.example_id, one.sample) for one in rollouts]
        assert {name for name, _ in keys} == {one.id for one in questions}
        judgements = []
        for key in keys:
            self.judged[key] += 1
            said = "Velm" if key in self.right else "Sarn"
            failure = Failure(FailureKind.TRANSIENT, "no reply") if key in self.fails else None
            judgements.append(
                Judgement({"em": float(key in self.right)}, Answer(said, said, 5, 1))
                if failure is None
                else Judgement(failure=failure)
            )
        scored = outcome(questions, rollouts, judgements, self.config)
        return replace(scored, usage=Usage(len(keys), len(keys), 7 * len(keys)))


class FakeFleet:
    """Does a unit in each turn."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.units: list[Any] = []

    def submit(self, method: Any, key: str, unit: Any, then: Any) -> None:
        assert key not in [one[0] for one in self.units]
        self.units.append((key, unit, then))

    def turn(self) -> None:
        if self.units:
            key, unit, then = self.units.pop(0)
            then(key, self.answer(unit))


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(tmp_path, monkeypatch)


def test_a_round_keeps_what_made_the_frozen_lm_right(stand: Stand) -> None:
    kept = stand.gather()
    # Of q2 two are right, with one reward and one length: the first is kept.
    assert [key_of(one) for one in kept] == [("q0", 1), ("q2", 0), ("q4", 2)]
    assert len(stand.lines) == len(QUESTIONS) * K
    assert {one["reason"] for one in stand.lines} == {
        "right answer", "the frozen LM's answer is wrong",
        "good, but others of the question have a higher reward",
    }  # fmt: skip
    table = (stand.folder / "reject" / "round-1.md").read_text()
    assert "| questions with a rationale | 3 | 3 |" in table
    assert sorted(path.name for path in (stand.folder / "reject").iterdir()) == [
        "round-1.jsonl", "round-1.md",
    ]  # fmt: skip
    (line,) = read_metrics(stand.folder / "metrics.jsonl")
    assert (line["stage"], line["step"]) == ("reject", 1)
    assert line["rejection/solved_share"] == 0.6
    assert line["rejection/pass_at_1"] == pytest.approx(4 / 15)
    assert line["frozen/requests"] == 15
    spent = json.loads((stand.folder / "spending.json").read_text())
    assert spent["reject"]["tokens"] == 15 * 7
    assert stand.gather() == kept
    assert set(stand.sampled.values()) == set(stand.judged.values()) == {1}


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("kind", ["add_sampled", "add_judged"])
def test_a_killed_round_continues_without_doing_anything_again(
    stand: Stand,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    at: int,
    written: bool,
) -> None:
    """Killed before or after a write of each unit; what is on disk is neither sampled nor judged
    again, and the result is that of a round without a kill."""
    write, calls = getattr(RoundFiles, kind), Counter[str]()

    def dies(self: RoundFiles, lines: Any) -> None:
        calls["all"] += 1
        if calls["all"] == at + 1 and not written:
            raise Killed
        write(self, lines)
        if calls["all"] == at + 1:
            raise Killed

    monkeypatch.setattr(RoundFiles, kind, dies)
    units = -(-len(QUESTIONS) // 2)
    if at < units:
        with pytest.raises(Killed):
            stand.gather()
    else:
        stand.gather()
    files = RoundFiles(stand.folder / "reject", 1)
    there = Counter((one.example_id, one.sample) for one in files.sampled())
    known = Counter(files.judged().keys())
    before = stand.sampled.copy(), stand.judged.copy()
    stand.gather()
    assert all(stand.sampled[key] == before[0][key] for key in there)
    assert all(stand.judged[key] == before[1][key] for key in known)
    resumed = stand.lines
    whole = Stand(tmp_path_factory.mktemp("whole"), monkeypatch)
    monkeypatch.setattr(RoundFiles, kind, write)
    whole.gather()
    without = [{**one, "unit_id": ""} for one in whole.lines]
    assert [{**one, "unit_id": ""} for one in resumed] == without


def test_lines_that_a_kill_cut_short_are_done_again(stand: Stand) -> None:
    whole = stand.gather()
    folder = stand.folder / "reject"
    lines = (folder / "round-1.jsonl").read_text().splitlines(keepends=True)
    (folder / "round-1.jsonl").unlink()
    full = [{**json.loads(line), "prompt_ids": [1, 2], "logprobs": [0.0, 0.0]} for line in lines]
    text = "".join(json.dumps(one) + "\n" for one in full)
    # The samples of q4 are cut within its last line; of what was judged only q0 is there.
    (folder / "round-1.sampled.jsonl").write_text(text[:-20])
    (folder / "round-1.judged.jsonl").write_text("".join(lines[:K]) + lines[K][:50])
    stand.sampled.clear()
    stand.judged.clear()
    assert [key_of(one) for one in stand.gather()] == [key_of(one) for one in whole]
    assert {name for name, _ in stand.sampled} == {"q4"}
    assert {name for name, _ in stand.judged} == set(QUESTIONS) - {"q0"}


def test_what_could_not_be_judged_is_tried_again_and_not_sampled_again(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand.fails = {("q0", 1), ("q1", 0)}
    monkeypatch.setattr(RoundFiles, "finish", lambda self, records, table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stand.gather()
    monkeypatch.undo()
    again = Stand(stand.folder, monkeypatch)
    again.gather()
    assert not again.sampled
    assert set(again.judged) == {("q0", 1), ("q1", 0)}
    assert all(one["reward"] is not None for one in again.lines)


def test_failures_beyond_the_budget_end_the_round(stand: Stand) -> None:
    stand.fails = {(name, sample) for name in QUESTIONS[:3] for sample in range(K)}
    with pytest.raises(UserError, match=r"8 of 15 judgements of round 1 failed|9 of 15"):
        stand.gather()


def test_nothing_right_stops_with_counts_answers_and_advice(stand: Stand) -> None:
    stand.right = set()
    with pytest.raises(UserError) as told:
        stand.gather()
    text = str(told.value)
    assert "round 1 has no rationale to learn from, of 15 sampled; 15 rejected" in text
    assert "what it answered: 'Sarn' where 'Velm' is right" in text
    assert "reject.min_f1" in text
    assert f"delete '{stand.folder / 'reject'}'" in text
    # The same command says it again and asks nothing.
    with pytest.raises(UserError, match="no rationale to learn from"):
        stand.gather()
    assert set(stand.sampled.values()) == {1}


def test_settings_cannot_change_once_something_is_sampled(stand: Stand) -> None:
    stand.gather()
    with RunDirectory(stand.folder) as directory:
        assert "reject" in directory.begun(stand.config)
        directory.write_config(stand.config)
        other = parse_config({**VALUES, "reject": {"samples": 4}})
        with pytest.raises(UserError, match=r"another value of reject.samples"):
            directory.check_config(other)
        more = parse_config({**VALUES, "reject": {"samples": K, "rounds": 2}})
        assert directory.check_config(more) == ["reject.rounds: 2 now, 1 before"]
