"""Samples and judges the rationales of a round, on whatever actors are free."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from lmcot.actors.news import wait_for_news
from lmcot.actors.resources.cluster import check_plan
from lmcot.actors.reward_actor import RewardActor
from lmcot.actors.rollout_actor import RolloutActor
from lmcot.actors.units import Packed, RolloutUnit, Scored, ScoreUnit
from lmcot.config import training_stage
from lmcot.config.reject import RejectSettings
from lmcot.data.row_requests import without_text
from lmcot.data.sampler import sample_seed
from lmcot.monitor.progress import Progress, progress, say
from lmcot.records import Rollout, Usage
from lmcot.run.budgets import Losses
from lmcot.run.context import Run, in_units
from lmcot.run.inputs import contents
from lmcot.run.roles import judging_roles
from lmcot.training.filters import Filters, prompt_labels
from lmcot.training.pipeline import Fleets
from lmcot.training.rationale_table import answers_shown, counts_of_reasons
from lmcot.training.rejection.choosing import as_annotations, decided, is_good
from lmcot.training.rejection.files import Key, Record, RoundFiles, key_of
from lmcot.training.start import open_fleets

STAGE: Final = training_stage("reject")
_FIRST: Final = 64
"""Judged rationales after which a round of which none is good is worth a warning."""


class RoundSampling:
    """What is missing of a round is sampled by its policy, and judged by the rewards.

    The seed of a rationale is a function of the run's seed, the round, the question and the sample,
    so that an interrupted round continues with the same rationales.
    """

    def __init__(self, run: Run, settings: RejectSettings, number: int, files: RoundFiles) -> None:
        self._run = run
        self._settings = settings
        self._number = number
        self._files = files
        self._rows = {one.example.id: row for row, one in enumerate(run.train)}
        labels = prompt_labels(run.templates.for_small.user)
        # What was sampled has at most policy.max_new_tokens tokens.
        self._filters = Filters(settings.filters, lambda text: True, labels, run.task)
        self._there: set[str] = set()
        self._judged: dict[Key, Record] = {}
        self._warned = False
        self.usage = Usage()
        """Requests to the frozen LM in this session."""

    @property
    def total(self) -> int:
        """Number of rationales of the round."""
        return len(self._rows) * self._settings.samples

    def records(self, source: str) -> list[Record]:
        """All rationales of the round with their judgements; samples and judges what is missing.

        Args:
            source: model source of the round's policy.
        """
        judged = self._files.judged()
        unjudged: dict[Key, Rollout] = {}
        found: set[Key] = set()
        for rollout in self._files.sampled():
            key = (rollout.example_id, rollout.sample)
            found.add(key)
            if key not in judged:
                unjudged[key] = rollout
        # A kill may have kept some samples of a question off the disk.
        samples = range(self._settings.samples)
        self._there = {n for n in self._rows if all((n, sample) in found for sample in samples)}
        self._judged = {key: one for key, one in judged.items() if key[0] in self._there}
        if len(self._judged) < self.total:
            self._work_off(source, [one for key, one in unjudged.items() if key[0] in self._there])
        return list(self._judged.values())

    def _work_off(self, source: str, unjudged: Sequence[Rollout]) -> None:
        run = self._run
        check_plan(STAGE.name, judging_roles(run.config), run.config.actors)
        if self._there:
            say(
                f"{STAGE.name}: round {self._number} continues; of {self.total} rationales "
                f"{len(self._there) * self._settings.samples} are sampled and {len(self._judged)} "
                "judged"
            )
        with ExitStack() as stack:
            fleets = open_fleets(run, source, stack, trains=False)
            fleets.wait_ready()
            run.directory.begin(STAGE.name, contents(run, STAGE.name))
            name = f"{STAGE.name}, round {self._number}"
            with progress(name, self.total, unit="rationale", done=len(self._judged)) as bar:
                self._submit(fleets, unjudged, bar)
                while len(self._judged) < self.total:
                    run.interruption.check()
                    if fleets.frozen is not None:
                        fleets.frozen.keep_up()  # its clients call its actors by themselves
                    fleets.rollout.turn()
                    fleets.reward.turn()
                    if len(self._judged) < self.total:
                        wait_for_news(*fleets.all)

    def _submit(self, fleets: Fleets, unjudged: Sequence[Rollout], bar: Progress) -> None:
        """Queues the questions without samples, and the samples without a judgement."""
        config, train = self._run.config, self._run.train
        total, what = self.total, f"judgements of round {self._number}"
        losses = Losses(config.failures, total, what)

        def judge(key: str, packed: Packed[list[Rollout]]) -> None:
            rollouts = packed.open()
            self._files.add_sampled(rollouts)
            submit(key, rollouts)

        def submit(key: str, rollouts: Sequence[Rollout]) -> None:
            names = dict.fromkeys(one.example_id for one in rollouts)
            questions = Packed.of(tuple(train[self._rows[name]].example for name in names))
            unit = ScoreUnit(key, questions, Packed.of(list(rollouts)))
            fleets.reward.submit(RewardActor.score, key, unit, keep)

        def keep(_: str, scored: Scored) -> None:
            self._keep(scored)
            bar.update(len(scored.columns["judged"]), good=float(self._good()))
            # What was judged is on disk by now, whichever limit ends the run.
            self._run.spending.add(STAGE.name, scored.usage)
            self._run.tell_unmeasured(scored.unmeasured)
            losses.add(scored.failures)

        by_unit: dict[int, list[Rollout]] = defaultdict(list)
        for one in unjudged:
            by_unit[self._rows[one.example_id] // config.actors.prompts_per_unit].append(one)
        for place, rollouts in by_unit.items():
            submit(f"{STAGE.name}/{self._number}/judge/{place}", rollouts)
        for rows in in_units(list(self._rows.values()), config.actors.prompts_per_unit):
            if missing := [row for row in rows if train[row].example.id not in self._there]:
                unit = self._unit(missing)
                fleets.rollout.submit(RolloutActor.sample, unit.unit_id, unit, judge)

    def _unit(self, rows: Sequence[int]) -> RolloutUnit:
        config = self._run.config
        return RolloutUnit(
            unit_id=f"{STAGE.name}/{self._number}/{rows[0]}",
            questions=Packed.of(tuple(self._run.train[row].example for row in rows)),
            samples=self._settings.samples,
            temperature=self._settings.temperature or config.policy.temperature,
            max_new_tokens=config.policy.max_new_tokens,
            # Not the seeds of refinement, whose steps count from 0 too.
            seed=sample_seed(config.seed, STAGE.name),
            step=self._number,
            policy_version=0,
        )

    def _keep(self, scored: Scored) -> None:
        self.usage += scored.usage
        records = [self._decided(json.loads(line)) for line in scored.records.splitlines()]
        self._files.add_judged(records)
        self._judged.update((key_of(one), one) for one in records)
        self._warn()

    def _decided(self, record: Record) -> Record:
        example = self._run.train[self._rows[record["example_id"]]].example
        prompt = self._run.templates.rationale(without_text(example))
        return decided(example, record, self._settings, self._filters, prompt)

    def _good(self) -> int:
        return sum(map(is_good, self._judged.values()))

    def _warn(self) -> None:
        if self._warned or len(self._judged) < _FIRST or self._good():
            return
        self._warned = True
        found = as_annotations(self._judged.values())
        examples = (one.example for one in self._run.train)
        say(
            f"{STAGE.name}: nothing good among the first {len(found)} rationales"
            f"{counts_of_reasons(found)}{answers_shown(examples, found)}"
        )
