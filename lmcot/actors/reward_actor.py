"""Judges rationales: with the frozen LM, or by the toy task's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmcot.actors.base import ActorBase, NotSetUp
from lmcot.actors.frozen_client import FrozenClient
from lmcot.actors.kept import Split, fetch
from lmcot.actors.units import (
    Judged,
    JudgeUnit,
    KeptScoreUnit,
    Packed,
    Scored,
    ScoreUnit,
    Tally,
)
from lmcot.config import Config, GivenDemonstrations, SignalFilter
from lmcot.data.tasks import open_task
from lmcot.frozen.templates import open_templates
from lmcot.records import Example, Judgement, Rollout, ScoredRollout
from lmcot.rewards.combine import judge_increasing
from lmcot.rewards.custom import CustomReward
from lmcot.rewards.judge import RewardModel
from lmcot.rewards.scoring import columns, score, unmeasured
from lmcot.rewards.signal import group_results
from lmcot.rollout_log import encode_rollouts

_SHARE_OF_UNIT = 0.9
"""Share of the unit timeout for the frozen LM's calls: a late call is reported before the actor
counts as hung."""

_UNTOLD = Judgement()


class RewardActor(ActorBase):
    """A client of the frozen-LM fleet; it holds no model, and so does not import torch, unless
    demonstrations are chosen for each question by their embeddings."""

    def __init__(self, config: Config, functions: Mapping[str, CustomReward] | None = None) -> None:
        """Keeps the settings.

        Args:
            functions: custom rewards of the program that runs the stage, by the names that the
                settings call them.
        """
        self._config = config
        self._functions = functions or {}

    def setup(
        self, frozen_handles: list[Any], demonstrations: GivenDemonstrations | None = None
    ) -> None:
        """Connects to the frozen LM's actors, where the rewards need them.

        Not in the constructor: Ray could not restart an actor whose arguments went out of scope.

        Args:
            demonstrations: those that were drawn, if any were.
        """
        config = self._config.showing(demonstrations)
        if config.rewards.kind != "guidance" or config.frozen is None:
            return
        self._frozen = FrozenClient(
            frozen_handles,
            limit_s=_SHARE_OF_UNIT * config.actors.unit_timeout_s,
            attempts=config.actors.max_attempts,
        )
        self._model = RewardModel(
            config.rewards,
            self._frozen,
            open_templates(config.prompts),
            config.frozen.answer_limit,
            config.prompts.guided_kind,
            self._functions,
            open_task(config.task),
        )

    def judge(self, unit: JudgeUnit) -> Judged:
        """Judges each text of the unit."""
        model = self._begin_unit()
        judgements = model.judge(unit.questions.open(), unit.rationales)
        return Judged(tuple(judgements), self._frozen.usage)

    def score(self, unit: ScoreUnit) -> Scored:
        """Judges each rollout of the unit, and scores it."""
        config, rollouts, questions = self._config, unit.rollouts.open(), unit.questions.open()
        if config.rewards.kind == "increasing":
            judgements = judge_increasing(rollouts, config.rewards)
            return outcome(questions, rollouts, judgements, config, unit.signal)
        model = self._begin_unit()
        examples = {example.id: example for example in questions}
        asked = [examples[rollout.example_id] for rollout in rollouts]
        judgements = model.judge_rollouts(asked, rollouts)
        return replace(
            outcome(questions, rollouts, judgements, config, unit.signal),
            usage=self._frozen.usage,
            frozen_seconds=self._frozen.seconds,
        )

    def score_split(self, unit: KeptScoreUnit) -> Split[Tally | None]:
        """Scores rollouts that it fetches from the object store; None if they are lost.

        Kept are the rollouts that are learnt from, and the records.
        """
        (rollouts,) = fetch([unit.rollouts])
        if rollouts is None:
            return Split(None, (None, None))
        found = self.score(ScoreUnit(unit.unit_id, unit.questions, rollouts, unit.signal))
        return Split(found.tally, (found.scored, found.records))

    def _begin_unit(self) -> RewardModel:
        if not hasattr(self, "_model"):
            raise NotSetUp("it was started anew")
        self._frozen.begin_unit()
        return self._model


def outcome(
    questions: Sequence[Example],
    rollouts: Sequence[Rollout],
    judgements: Sequence[Judgement],
    config: Config,
    signal: SignalFilter | None = None,
) -> Scored:
    """The scores that a unit's judgements come to.

    Args:
        rollouts: question by question.
        signal: leaves questions out that teach nothing.
    """
    scored = score(rollouts, judgements, config.rewards, config.policy.max_new_tokens)
    results = group_results(rollouts, scored, config.rewards, signal)
    left_out = [one.left_out for one in results for _ in range(one.rationales)]
    pairs = zip(scored, left_out, strict=True)
    examples = {one.id: one for one in questions}
    return Scored(
        scored=Packed.of([_learnable(one) for one, why in pairs if one is not None and not why]),
        columns=columns(rollouts, judgements, scored),
        records=encode_rollouts(rollouts, judgements, scored, examples, left_out),
        results=tuple(results),
        failures=tuple(one.failure for one in judgements if one.failure is not None),
        unmeasured=tuple(unmeasured(judgements).items()),
    )


def _learnable(one: ScoredRollout) -> ScoredRollout:
    """The rollout and its reward, without what PPO does not read."""
    return ScoredRollout(replace(one.rollout, text=""), _UNTOLD, one.reward)
