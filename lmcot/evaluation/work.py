"""The work of an evaluation: the rationales, answers and judgements that are not on disk yet.

First the rationales, policy by policy; then the answers, row by row; then the aspects of the
rationales. Each result is on disk as soon as it arrives.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from lmcot.actors.fleet import Fleet
from lmcot.actors.frozen_actor import FrozenActor
from lmcot.actors.resources.cluster import check_plan
from lmcot.actors.reward_actor import RewardActor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import Judged, JudgeUnit, Packed
from lmcot.config.rows import RowSpec
from lmcot.evaluation.predictions import Attempt, predict
from lmcot.evaluation.requests import (
    Votes,
    answers_of,
    own_answers,
    prompt_units,
    rationale_units,
    rationales_of,
)
from lmcot.evaluation.rows import chooses, shown_texts
from lmcot.evaluation.store import AspectScores, EvaluationFiles
from lmcot.frozen.cached import Replies
from lmcot.monitor.progress import Progress, progress
from lmcot.records import Example, Failure, Rollout, Usage
from lmcot.rewards.scoring import unmeasured
from lmcot.run.budgets import Losses
from lmcot.run.context import Run, in_units
from lmcot.run.first_answers import FirstAnswer
from lmcot.run.roles import aspect_roles, evaluate_roles


@dataclass
class _Work:
    """What all parts of the work share."""

    run: Run
    files: EvaluationFiles
    bar: Progress
    usage: Usage = field(default_factory=Usage)
    """Requests to the frozen LM so far."""

    @property
    def examples(self) -> Sequence[Example]:
        """The questions."""
        return self.files.examples

    @property
    def order(self) -> list[str]:
        """Ids of the questions in their order."""
        return [one.id for one in self.examples]

    def groups(self, rows: Sequence[int]) -> list[list[int]]:
        """Indices of questions, as they are put into units."""
        return list(in_units(rows, self.run.config.actors.prompts_per_unit))

    def spend(self, usage: Usage) -> None:
        """Takes requests to the frozen LM into account."""
        self.usage += usage
        self.run.spending.add("evaluate", usage)


class _Laps:
    """Divides the time between results equally among the questions of each result."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self, questions: int) -> float:
        """Seconds for each of the questions since the last lap."""
        now = time.monotonic()
        seconds, self._last = (now - self._last) / questions, now
        return seconds


def do_missing(run: Run, policies: Mapping[str, str], files: EvaluationFiles) -> Usage:
    """Has everything written, answered and judged that is not on disk.

    Args:
        policies: the model source of each policy.

    Returns:
        the requests to the frozen LM.
    """
    config = run.config
    check_plan("evaluate", evaluate_roles(config, [row.name for row in files.rows]), config.actors)
    if files.aspects:
        check_plan("evaluate", aspect_roles(config), config.actors)
    with ExitStack() as stack:
        frozen = stack.enter_context(run.frozen_fleet())
        done = files.total - files.missing()
        bar = progress("evaluate", total=files.total, done=done, unit="question")
        work = _Work(run, files, stack.enter_context(bar))
        _write_rationales(work, policies)
        frozen.wait_ready()
        for row in files.rows:
            _answer(work, row, frozen)
        _judge_aspects(work, frozen)
    return work.usage


def _write_rationales(work: _Work, policies: Mapping[str, str]) -> None:
    """The rationales of all policies, one policy after the other, by the same actors."""
    files = work.files
    missing = {key: found for key in files.rationales if (found := files.unwritten(*key))}
    if not missing:
        return
    (loaded, _) = next(iter(missing))
    with work.run.rollout_fleet(policies[loaded]) as fleet:
        fleet.wait_ready()
        for (policy, sampled), rows in missing.items():
            if policy != loaded:
                fleet.configure(RolloutActor.use_source, policies[policy])
                loaded = policy
            _write(work, fleet, policy, sampled, rows)


def _write(
    work: _Work, fleet: Fleet[RolloutActor], policy: str, sampled: bool, rows: Sequence[int]
) -> None:
    """One policy's rationales."""
    config = work.run.config
    kept, laps = work.files.rationales[policy, sampled], _Laps()
    samples = config.evaluate.samples if sampled else 1

    def keep(_: int, unit: Packed[list[Rollout]]) -> None:
        found = rationales_of(unit.open(), samples)
        kept.add(found, seconds=laps.lap(len(found)))
        work.bar.update(len(found))

    examples = [work.examples[row] for row in rows]
    fleet.map(RolloutActor.sample, rationale_units(config, examples, sampled), on_result=keep)
    kept.finish(work.order)


def _answer(work: _Work, row: RowSpec, frozen: Fleet[FrozenActor]) -> None:
    """One row's predictions."""
    missing = work.files.unanswered(row)
    if not missing:
        return
    answers = _Answers(work, row, missing)
    if row.prompt is None:
        answers.read()
    else:
        answers.ask(frozen)
    work.files.predictions(row).finish(work.order)


class _Answers:
    """Turns the answers of one row into predictions, a group of questions at a time."""

    def __init__(self, work: _Work, row: RowSpec, missing: Sequence[int]) -> None:
        """Prepares the questions.

        Args:
            missing: indices of the questions that have no prediction.
        """
        self._work, self._row = work, row
        run, files = work.run, work.files
        self._groups = [part for one in work.groups(missing) for part in self._by_options(one)]
        self._shown = shown_texts(row, work.examples, files.texts(row), run.config.seed, run.task)
        self._losses = Losses(run.config.failures, len(missing), f"answers of the row {row.name}")
        self._laps = _Laps()

    def ask(self, frozen: Fleet[FrozenActor]) -> None:
        """Has the frozen LM answer."""
        run = self._work.run
        votes = Votes(self._row.attempts(run.config.evaluate.samples))

        def keep(index: int, unit: Replies) -> None:
            self._work.spend(unit.usage)
            if whole := votes.add(index, unit):
                self._asked(self._groups[whole[0]], whole[1])

        units = [
            unit
            for group in self._groups
            for unit in prompt_units(
                run,
                self._row,
                [self._work.examples[at] for at in group],
                [self._shown[at] for at in group],
                self._options(group[0]),
            )
        ]
        run.frozen_client(frozen).map(units, on_result=keep)

    def _options(self, at: int) -> tuple[str, ...]:
        """The options that the frozen LM chooses from; none where it writes a reply."""
        if not chooses(self._work.run.config, self._row):
            return ()
        return tuple(self._work.run.task.options(self._work.examples[at].question))

    def _by_options(self, rows: Sequence[int]) -> list[list[int]]:
        """The questions in groups of the same options."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for at in rows:
            groups.setdefault(self._options(at), []).append(at)
        return list(groups.values())

    def read(self) -> None:
        """Reads the answers out of the policy's rationales."""
        for group in self._groups:
            ids = [self._work.examples[at].id for at in group]
            found = [self._work.files.rationales_for(self._row, one) for one in ids]
            questions = [self._work.examples[at].question for at in group]
            attempts = [
                own_answers(one, question, self._work.run.task) if one else []
                for one, question in zip(found, questions, strict=True)
            ]
            self._keep(group, attempts, 0.0)

    def _asked(self, group: Sequence[int], units: Sequence[Replies]) -> None:
        attempts = [
            answers_of(
                self._shown[at],
                [unit.results[place] for unit in units],
                self._work.examples[at].question,
                self._work.run.task,
            )
            for place, at in enumerate(group)
        ]
        saved = sum(unit.usage.asked - unit.usage.sent for unit in units)
        self._keep(group, attempts, saved / len(group))
        self._losses.add(_first_failure(one) for one in attempts)

    def _keep(
        self, group: Sequence[int], attempts: Sequence[Sequence[Attempt]], cached: float
    ) -> None:
        """Scores a group's attempts and puts them on disk.

        Args:
            cached: requests of each question that the frozen LM's cache answered.
        """
        files, row, seconds = self._work.files, self._row, self._laps.lap(len(group))
        files.predictions(row).add(
            predict(
                self._work.examples[at],
                tried,
                files.rationales_for(row, self._work.examples[at].id),
                own=row.own,
                asked=row.prompt is not None,
                cached=cached,
                seconds=seconds,
                task=self._work.run.task,
                first=self._first(self._work.examples[at]),
            )
            for at, tried in zip(group, attempts, strict=True)
        )
        self._work.bar.update(len(group))

    def _first(self, example: Example) -> FirstAnswer | None:
        """The first answer whose cost the row bears; None if it bears none."""
        run = self._work.run
        if not (run.config.prompts.advises and self._row.rests_on_first_answer):
            return None
        return run.first_answers.of(example)


def _first_failure(attempts: Sequence[Attempt]) -> Failure | None:
    """The first failure of a question whose attempts all failed."""
    failures = [one.answer for one in attempts if isinstance(one.answer, Failure)]
    return failures[0] if len(failures) == len(attempts) else None


def _judge_aspects(work: _Work, frozen: Fleet[FrozenActor]) -> None:
    """Aspect scores of the greedy rationales, policy by policy."""
    files = work.files
    missing = {policy: found for policy in files.aspects if (found := files.unjudged(policy))}
    if not missing:
        return
    with work.run.reward_fleet() as fleet:
        fleet.wait_ready(frozen_handles=frozen.handles, demonstrations=work.run.demonstrations)
        for policy, rows in missing.items():
            _judge(work, fleet, policy, rows)


def _judge(work: _Work, fleet: Fleet[RewardActor], policy: str, rows: Sequence[int]) -> None:
    """One policy's rationales; the next evaluation tries those again that failed."""
    run, kept, groups = work.run, work.files.aspects[policy], work.groups(rows)
    losses = Losses(run.config.failures, len(rows), f"judgements of the {policy} policy")

    def keep(index: int, judged: Judged) -> None:
        work.spend(judged.usage)
        kept.add(
            AspectScores.of(work.examples[at].id, one)
            for at, one in zip(groups[index], judged.judgements, strict=True)
            if one.failure is None
        )
        work.bar.update(len(judged.judgements))
        run.tell_unmeasured(unmeasured(judged.judgements).items())
        losses.add(one.failure for one in judged.judgements if one.failure is not None)

    fleet.map(
        RewardActor.judge, [_judge_unit(work, policy, group) for group in groups], on_result=keep
    )
    kept.finish(work.order)


def _judge_unit(work: _Work, policy: str, rows: Sequence[int]) -> JudgeUnit:
    examples = tuple(work.examples[at] for at in rows)
    texts = tuple(work.files.rationale(policy, one.id).texts[0] for one in examples)
    return JudgeUnit(f"evaluate/{policy}/{rows[0]}", Packed.of(examples), texts)
