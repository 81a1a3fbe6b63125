"""Batches on their way: what is open, in which order, what is kept, and what waits its turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.actors.kept import Kept, Split
from lmcot.actors.ledger import UnitLost
from lmcot.actors.reward_actor import outcome
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import Packed, Scored
from lmcot.config import BudgetSettings, load_config
from lmcot.data.sampler import PromptSampler
from lmcot.errors import Interrupted, UserError
from lmcot.records import (
    Example,
    Failure,
    FailureKind,
    Judgement,
    Paragraph,
    Rollout,
    RunState,
    ScoredRollout,
    Usage,
)
from lmcot.run.budgets import Spending
from lmcot.training import pipeline as module
from lmcot.training.batch import Batch
from lmcot.training.pipeline import Fleets, Pipeline
from lmcot.training.start import fresh_state

TOY = Path(__file__).parents[3] / "configs" / "toy.yaml"
CONFIG = load_config(TOY)
RIGHT = Judgement({"increasing": 1.0})


class FakeFleet:
    """Keeps what it is given; `finish` has its oldest units done."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.units: dict[str, Any] = {}
        self.then: dict[str, Any] = {}
        self.done: list[str] = []
        self.most = 0

    def submit(self, method: Any, key: str, unit: Any, then: Any) -> None:
        assert key not in self.units
        self.units[key] = unit
        self.then[key] = then
        self.most = max(self.most, len(self.units))

    def submit_split(self, method: Any, key: str, unit: Any, then: Any, *, kept: int) -> None:
        def split(key: str, answer: Any) -> None:
            if isinstance(answer, Packed):
                answer = Split(None, (answer,))
            elif isinstance(answer, Scored):
                answer = Split(answer.tally, (answer.scored, answer.records))
            assert len(answer.kept) == kept
            then(key, answer.told, tuple(map(Kept, answer.kept)))

        self.submit(method, key, unit, split)

    def turn(self) -> None:
        done, self.done = self.done, []
        for key in done:
            self.then[key](key, self.answer(self.units.pop(key)))

    def finish(self, count: int | None = None) -> None:
        self.done = list(self.units)[:count]

    def abandon(self) -> None:
        self.units.clear()

    def refs(self) -> list[Any]:
        return []


class FakeLearners:
    """Always well."""

    def __init__(self) -> None:
        self.looked = 0
        self.fetched: list[Packed[list[ScoredRollout]]] = []
        self.lost: list[set[int]] = []
        """Which units the next fetches do not find."""

    def refs(self) -> list[Any]:
        return []

    def fetch(self, units: list[Kept[Packed[list[ScoredRollout]]]]) -> Any:
        """The fakes keep the values themselves in the place of references."""
        self.fetched = [unit.ref for unit in units]
        return Fetched(self.lost.pop(0) if self.lost else set())

    def check(self) -> None:
        self.looked += 1

    def probe(self) -> None:
        return


class Fetched:
    """A fetch that is done."""

    def __init__(self, lost: set[int]) -> None:
        self.result = lambda: lost

    def done(self) -> bool:
        return True

    def refs(self) -> list[Any]:
        return []


class Call:
    """A call to the learners that takes so many looks and has no result."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def done(self) -> bool:
        self.left -= 1
        return self.left < 0

    def result(self) -> None:
        assert self.left < 0

    def refs(self) -> list[Any]:
        return []


def pending(looks: int) -> Any:
    """A `Call` in the place of a `Pending`."""
    return Call(looks)


def sampled(unit: Any) -> Packed[list[Rollout]]:
    return Packed.of([
        Rollout(unit.unit_id, example.id, k, (1,), (2,), (-0.5,), "eos", "x", unit.policy_version)
        for example in unit.questions.open() for k in range(unit.samples)
    ])  # fmt: skip


def judged(unit: Any, judgement: Judgement = RIGHT) -> Scored:
    return judged_by(unit, lambda rollout: judgement)


def judged_by(unit: Any, judge: Callable[[Rollout], Judgement]) -> Scored:
    rollouts = unit.rollouts.ref.open()
    assert {one.id for one in unit.questions.open()} == {one.example_id for one in rollouts}
    judgements = [judge(one) for one in rollouts]
    done = outcome(unit.questions.open(), rollouts, judgements, CONFIG, unit.signal)
    return replace(done, usage=Usage(1, 1, 5))


def lines_of(batch: Batch, key: str) -> list[str]:
    """What the records of a batch that is taken say of the rationales that are learnt from."""
    lines = [json.loads(line) for line in batch.records.splitlines()]
    return [line[key] for line in lines if line["reward"] is not None and "left_out" not in line]


def units(batch: Batch) -> list[str]:
    """Of the rationales that are learnt from, in their order."""
    return lines_of(batch, "unit_id")


def questions(batch: Batch) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(lines_of(batch, "example_id")))


def as_run(**parts: Any) -> Any:
    """As much of a `Run` as a pipeline needs."""
    return SimpleNamespace(**parts)


class Stand:
    """A pipeline between fakes: 12 questions, 4 a step, 2 a unit, 3 rationales each."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *overrides: str,
        state: RunState | None = None,
    ) -> None:
        settings = (
            "refine.prompts_per_step=4",
            "refine.samples_per_prompt=3",
            "refine.steps=10",
            "actors.prompts_per_unit=2",
        )
        questions = [
            SimpleNamespace(example=Example(f"q{n}", "?", "a", (Paragraph("t", ("s",)),)))
            for n in range(12)
        ]
        self.run = as_run(
            config=load_config(TOY, [*settings, *overrides]),
            train=questions,
            spending=Spending(folder / "spending.json", BudgetSettings()),
            interruption=SimpleNamespace(check=lambda: None),
            tell_unmeasured=lambda components: None,
        )
        self.rollout, self.reward = FakeFleet(sampled), FakeFleet(judged)
        self.learners = FakeLearners()
        fleets: Any = Fleets(self.rollout, self.reward)  # type: ignore[arg-type]
        state = state or fresh_state(self.run)
        self.pipeline = Pipeline(self.run, fleets, self.learners, state)
        self.waits: list[Any] = []
        monkeypatch.setattr(module, "wait_for_news", self.between)
        monkeypatch.setattr(module, "fetch", lambda values: [one.ref for one in values])

    def between(self, *sources: Any) -> None:
        """What happens while the driver waits: the next of the waits that were planned."""
        (self.waits.pop(0) if self.waits else self.all_done)()

    def all_done(self) -> None:
        self.rollout.finish()
        self.reward.finish()


def test_at_no_staleness_one_batch_is_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, monkeypatch)
    assert stand.pipeline.wants(0)
    stand.pipeline.sample(0, ())
    assert not stand.pipeline.wants(0)
    assert list(stand.rollout.units) == ["step-1/0", "step-1/1"]
    batch = stand.pipeline.take(0)
    assert units(batch) == ["step-1/0"] * 6 + ["step-1/1"] * 6
    learnt = [one for unit in stand.learners.fetched for one in unit.open()]
    assert [one.rollout.unit_id for one in learnt] == units(batch)
    assert all((one.rollout.text, one.judgement) == ("", Judgement()) for one in learnt)
    assert list(batch.columns["judged"]) == [1.0] * 12
    assert batch.failures == []
    assert batch.usage == Usage(2, 2, 10)
    assert stand.pipeline.wants(1)
    stand.pipeline.sample(1, ("weights",))
    assert {unit.policy_version for unit in stand.rollout.units.values()} == {1}
    assert {unit.weights for unit in stand.rollout.units.values()} == {("weights",)}


def test_a_unit_is_judged_while_others_are_sampled_and_order_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, monkeypatch)
    stand.pipeline.sample(0, ())
    last_first = ["step-1/1", "step-1/0"]

    def second() -> None:
        stand.rollout.done = [last_first[0]]

    def judge_it() -> None:
        assert list(stand.reward.units) == last_first[:1]
        assert list(stand.rollout.units) == last_first[1:]
        stand.reward.finish()
        stand.rollout.finish()

    stand.waits = [second, judge_it]
    batch = stand.pipeline.take(0)
    assert units(batch) == ["step-1/0"] * 6 + ["step-1/1"] * 6


@pytest.mark.parametrize("staleness", [1, 3])
def test_no_more_batches_are_open_than_staleness_admits(
    staleness: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the learners or the reward side are: the queues are bounded."""
    stand = Stand(tmp_path, monkeypatch, f"refine.max_staleness={staleness}")
    versions = []
    for step in range(10):
        stand.pipeline.sample(step, ())
        stand.pipeline.work_until(pending(looks=20))
        assert stand.pipeline.ready() == min(staleness + 1, 10 - step)
        batch = stand.pipeline.take(step)
        versions.append(batch.version)
        assert batch.step - batch.version == min(step, staleness)
    assert versions == [max(0, step - staleness) for step in range(10)]
    assert stand.rollout.most <= 2 * (staleness + 1)
    assert stand.reward.most <= 2 * (staleness + 1)
    assert not stand.pipeline.wants(10), "there are no steps beyond the last"
    assert stand.rollout.units == stand.reward.units == {}


def test_every_question_of_an_epoch_comes_once_whatever_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, list[str]] = {}
    for staleness in (0, 2):
        stand = Stand(tmp_path, monkeypatch, f"refine.max_staleness={staleness}")
        asked[staleness] = []
        for step in range(6):
            stand.pipeline.sample(step, ())
            asked[staleness] += questions(stand.pipeline.take(step))
        assert all(len(set(asked[staleness][at : at + 12])) == 12 for at in (0, 12))
    assert asked[0] == asked[2]


def test_a_batchs_sampler_state_is_where_a_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the batches that are open ahead of it have come to."""
    stand = Stand(tmp_path, monkeypatch, "refine.max_staleness=2")
    stand.pipeline.sample(0, ())
    batch = stand.pipeline.take(0)
    flying = {*stand.rollout.units, *stand.reward.units}
    assert {key.partition("/")[0] for key in flying} <= {"step-2", "step-3"}
    state = fresh_state(stand.run)
    state.step, state.sampler = 1, batch.sampler
    again = Stand(tmp_path, monkeypatch, "refine.max_staleness=2")
    fleets: Any = Fleets(again.rollout, again.reward)  # type: ignore[arg-type]
    resumed = Pipeline(stand.run, fleets, again.learners, state)
    resumed.sample(1, ())
    assert list(again.rollout.units) == [f"step-{n}/{unit}" for n in (2, 3, 4) for unit in (0, 1)]
    assert flying <= set(again.rollout.units)


def test_what_goes_wrong_while_the_learners_learn_waits_until_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else their step would be lost with it."""
    stand = Stand(tmp_path, monkeypatch, "refine.max_staleness=1")
    stand.pipeline.sample(0, ())
    stand.waits = [lambda: stand.rollout.finish(2), lambda: stand.reward.finish(2)]
    stand.pipeline.take(0)
    failed = Judgement(failure=Failure(FailureKind.TRANSIENT, "the endpoint is down"))
    stand.reward.answer = lambda unit: judged(unit, failed)
    call = pending(looks=30)
    stand.pipeline.work_until(call)
    assert call.left < 0
    with pytest.raises(UserError, match=r"judgements of step 2 failed, .*the endpoint is down"):
        stand.pipeline.take(1)


def test_an_interruption_is_seen_while_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, monkeypatch)
    stand.pipeline.sample(0, ())

    def interrupt() -> None:
        raise Interrupted

    stand.run.interruption.check = interrupt
    with pytest.raises(Interrupted):
        stand.pipeline.take(0)


class FakeGuest:
    """Has one unit sampled beside those of the batches, and calls the frozen LM by itself."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.turns = 0
        self.frozen_seconds = 0.0
        self.abandoned = False

    def sampled(self, key: str, rollouts: Any) -> None:
        self.came.append(key)

    def refs(self) -> list[Any]:
        return []

    def turn(self) -> None:
        self.turns += 1
        self.frozen_seconds += 0.5

    def abandon(self) -> None:
        self.abandoned = True


def test_a_guest_has_its_turns_and_its_share_of_the_frozen_lms_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand, guest = Stand(tmp_path, monkeypatch), FakeGuest()
    stand.reward.answer = lambda unit: replace(judged(unit), frozen_seconds=2.0)
    fleets: Any = Fleets(stand.rollout, stand.reward)  # type: ignore[arg-type]
    sources: list[Any] = []

    def wait(*given: Any) -> None:
        sources.extend(given)
        stand.all_done()

    monkeypatch.setattr(module, "wait_for_news", wait)
    with Pipeline(stand.run, fleets, stand.learners, fresh_state(stand.run), guest) as pipeline:
        pipeline.sample(0, ())
        step_1 = stand.rollout.units["step-1/0"]
        own = replace(step_1, unit_id="guest's")
        stand.rollout.submit(RolloutActor.sample, "guest's", own, guest.sampled)
        pipeline.take(0)
        assert guest.came == ["guest's"]
        assert guest.turns > 0
        assert pipeline.frozen_seconds == 2 * 2.0 + 0.5 * guest.turns
        assert guest in sources, "its calls end the driver's waits, too"
        assert not guest.abandoned
    assert guest.abandoned


FILTERED = ("refine.filter={refill: 1.0}", "refine.advantage={kind: rloo}")


def by_question(rollout: Rollout) -> Judgement:
    """Questions 0, 3, 6 and 9 are always solved, 1 is half right, 2 never solved; others differ."""
    number = int(rollout.example_id[1:])
    differs = 1.0 if rollout.sample else 0.0
    always = {0: 1.0, 3: 1.0, 6: 1.0, 9: 1.0, 1: 0.5, 2: 0.0}
    return Judgement({"increasing": always.get(number, differs)})


def filtered(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, **given: Any) -> Stand:
    stand = Stand(folder, monkeypatch, *FILTERED, *overrides, **given)
    stand.reward.answer = lambda unit: judged_by(unit, by_question)
    return stand


def asked(batch: Batch) -> list[str]:
    """All questions whose rationales were judged, each once, in order."""
    lines = (json.loads(line) for line in batch.records.splitlines())
    return list(dict.fromkeys(line["example_id"] for line in lines))


def test_others_are_asked_in_place_of_those_that_teach_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = filtered(tmp_path, monkeypatch)
    order = [f"q{row}" for row in PromptSampler(12, 0).next(12)]
    left_out = {"q0", "q1", "q2", "q3", "q6", "q9"}
    stand.pipeline.sample(0, ("weights",))
    assert [one.id for unit in stand.rollout.units.values() for one in unit.questions.open()] == (
        order[:4]
    )
    batch = stand.pipeline.take(0)
    every = asked(batch)
    assert every == order[: len(every)]
    assert 4 < len(every) <= 8
    assert questions(batch) == [one for one in every if one not in left_out]
    assert len(questions(batch)) == 4 or len(every) == 8
    keys = [f"step-1/{number}" for number in range(len(batch.keys))]
    assert batch.keys == keys
    metrics = batch.choice_metrics
    assert metrics["filter/asked"] == len(every)
    assert metrics["filter/refilled"] == len(every) - 4
    assert metrics["filter/right"] == len({"q0", "q3", "q6", "q9"} & {*every})
    assert metrics["filter/wrong"] == ("q2" in every)
    assert metrics["filter/equal"] == ("q1" in every)
    assert metrics["filter/few"] == 0
    assert metrics["filter/filled"] == len(questions(batch)) / 4
    assert len(batch.columns["judged"]) == 3 * len(every), "rewards are of all that was sampled"
    assert batch.usage == Usage(len(keys), len(keys), 5 * len(keys)), "and so is what it cost"
    assert batch.weights == (), "they are let go"
    stand.pipeline.sample(1, ())
    following = [one.id for unit in stand.rollout.units.values() for one in unit.questions.open()]
    assert following == order[len(every) :][:4], "what was not asked comes next"


def test_which_unit_is_done_first_does_not_change_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an actor is lost, and its unit comes last."""

    def last_first(fleet: FakeFleet) -> None:
        fleet.done = list(fleet.units)[-1:]

    found = []
    for slow in (False, True):
        stand = filtered(tmp_path, monkeypatch, "refine.max_staleness=2")
        if slow:
            turns = [lambda s=stand: last_first(s.rollout), lambda s=stand: last_first(s.reward)]
            stand.waits = turns * 100
        steps = []
        for step in range(6):
            stand.pipeline.sample(step, ())
            batch = stand.pipeline.take(step)
            steps.append((asked(batch), batch.records, batch.choice_metrics, batch.sampler))
        found.append(steps)
    assert found[0] == found[1]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_filtered_run_that_resumes_asks_the_same(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[29] with a curriculum, too; the state goes through a file."""
    rest = "refine.curriculum={solved: 1, unsolved: 1, rest: 1}"
    stand = filtered(tmp_path, monkeypatch, rest)
    whole = []
    for step in range(8):
        stand.pipeline.sample(step, ())
        whole.append(stand.pipeline.take(step))
    saved = json.loads(json.dumps(whole[at - 1].sampler))
    state = RunState("refine", at, saved)
    again = filtered(tmp_path, monkeypatch, rest, state=state)
    for step in range(at, 8):
        again.pipeline.sample(step, ())
        batch = again.pipeline.take(step)
        assert asked(batch) == asked(whole[step])
        assert batch.sampler == whole[step].sampler
        assert batch.choice_metrics == whole[step].choice_metrics
    assert any(one.choice_metrics["curriculum/passed"] for one in whole)


def test_failures_are_a_share_of_all_that_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refill counts with the others; a question that could not be judged is asked no more."""
    stand = filtered(tmp_path, monkeypatch)
    down = Judgement(failure=Failure(FailureKind.TRANSIENT, "the endpoint is down"))
    order = [f"q{row}" for row in PromptSampler(12, 0).next(12)]

    def judge(rollout: Rollout) -> Judgement:
        return down if rollout.example_id in order[1:3] else by_question(rollout)

    stand.reward.answer = lambda unit: judged_by(unit, judge)
    stand.pipeline.sample(0, ())
    batch = stand.pipeline.take(0)
    assert batch.choice_metrics["filter/few"] == 2
    assert len(batch.failures) == 6
    stand.reward.answer = lambda unit: judged_by(unit, lambda rollout: down)
    stand.pipeline.sample(1, ())
    with pytest.raises(UserError, match="of 12 judgements of step 2 failed"):
        stand.pipeline.take(1)


def told(batch: Batch) -> tuple[Any, ...]:
    """What a step makes of a batch."""
    return batch.records, batch.columns.values.tobytes(), batch.results, batch.usage, batch.sampler


@pytest.mark.parametrize("where", ["judging", "learning", "recording"])
def test_a_unit_that_is_lost_with_its_node_is_sampled_again_and_counts_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = filtered(tmp_path / "a", monkeypatch)
    undisturbed.pipeline.sample(0, ("weights",))
    expected = undisturbed.pipeline.take(0)

    stand = filtered(tmp_path / "b", monkeypatch)
    asked_for: list[Any] = []
    judge = stand.reward.answer

    def sample(unit: Any) -> Packed[list[Rollout]]:
        asked_for.append(unit)
        return sampled(unit)

    stand.rollout.answer = sample
    if where == "judging":
        lost = iter([True, False])
        gone = Split(None, (None, None))
        stand.reward.answer = lambda unit: (
            gone if unit.unit_id == "step-1/1" and next(lost) else judge(unit)
        )
    elif where == "learning":
        stand.learners.lost = [{1}]
    else:
        gone_first = iter([1])

        def fetched(values: Any) -> list[Any]:
            at = next(gone_first, None)
            return [None if number == at else one.ref for number, one in enumerate(values)]

        monkeypatch.setattr(module, "fetch", fetched)
    stand.pipeline.sample(0, ("weights",))
    batch = stand.pipeline.take(0)
    assert told(batch) == told(expected)
    again = [unit for unit in asked_for if unit.unit_id == "step-1/1"]
    assert len(again) == 2
    assert again[0] == again[1], "the same seeds, and the same weights"
    assert len(asked_for) == len(batch.keys) + 1
    assert len(stand.learners.fetched) == len(batch.keys)


def test_what_is_lost_again_and_again_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, monkeypatch, "actors.max_attempts=3")
    stand.learners.lost = [{0}] * 5
    stand.pipeline.sample(0, ())
    with pytest.raises(UnitLost, match="unit step-1/0 were lost 3 times from the object store"):
        stand.pipeline.take(0)
    assert len(stand.learners.lost) == 2


def test_a_batch_that_is_taken_holds_no_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, monkeypatch)
    stand.pipeline.sample(0, ("weights",))
    batch = stand.pipeline.take(0)
    assert (batch.units, batch.scored_by_unit, batch.records_by_unit) == ({}, {}, {})
    assert batch.weights == ()
