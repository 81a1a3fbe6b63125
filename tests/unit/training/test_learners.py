"""What stands around a training loop: resuming, recovering from lost learners, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.actors.learner_group import LearnerLost
from lmcot.config import OptimiserSettings
from lmcot.errors import Interrupted, UserError
from lmcot.learner.plan import LearnerPlan
from lmcot.monitor.progress import Progress
from lmcot.records import RunState
from lmcot.training.learners import Learners


class Stand:
    """Learners without actors: what is kept of a checkpoint is all that a restart brings back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kept: RunState | None = None) -> None:
        self.kept = kept
        self.saved: list[int] = []
        self.truncated: list[int] = []
        self.learners = Learners.__new__(Learners)
        monitor = SimpleNamespace(truncate=lambda stage, step: self.truncated.append(step))
        plan: Any = LearnerPlan("refine", "a/model", 6, OptimiserSettings(learning_rate=1e-5))
        run: Any = SimpleNamespace(monitor=monitor)
        self.learners._plan, self.learners._run = plan, run
        for name, does in (
            ("resume", lambda _: self.kept),
            ("recover", lambda _, lost: self.recover(lost)),
            ("checkpoint", lambda _, state, wait: self.saved.append(state.step)),
        ):
            monkeypatch.setattr(Learners, name, does)

    def recover(self, lost: LearnerLost) -> RunState | None:
        return self.kept

    def run(self, body: Callable[[RunState], None]) -> list[int]:
        """Trains up to step 6, with ``body`` before each step; the steps that were begun."""
        begun: list[int] = []

        def train(state: RunState, bar: Progress) -> None:
            assert bar.done == state.step
            for step in range(state.step, bar.total):
                begun.append(step)
                body(state)
                state.step = step + 1
                bar.update(1)

        self.learners.run_until_done(lambda: RunState("refine"), train)
        return begun


def raising(at: int, error: Exception) -> Callable[[RunState], None]:
    """Raises an error before a step, the first time."""
    left = [error]

    def body(state: RunState) -> None:
        if state.step == at and left:
            raise left.pop()

    return body


def test_a_stage_runs_from_its_checkpoint_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(monkeypatch)
    assert stand.run(lambda state: None) == [0, 1, 2, 3, 4, 5]
    assert "resuming" not in capsys.readouterr().err
    stand = Stand(monkeypatch, RunState("refine", 4))
    assert stand.run(lambda state: None) == [4, 5]
    assert "refine: resuming after step 4\n" in capsys.readouterr().err
    assert stand.truncated == [4], "what was logged after the checkpoint is logged again"


def test_lost_learners_repeat_the_steps_since_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand = Stand(monkeypatch)
    assert stand.run(raising(2, LearnerLost("dead"))) == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    stand = Stand(monkeypatch, RunState("refine", 1))
    stand.recover = lambda lost: RunState("refine", 3)  # type: ignore[method-assign]
    assert stand.run(raising(4, LearnerLost("dead"))) == [1, 2, 3, 4, 3, 4, 5]
    assert stand.truncated == [1, 3]
    assert stand.saved == []


@pytest.mark.parametrize("error", [Interrupted(), UserError("the budget is spent")])
def test_what_ends_a_run_leaves_a_checkpoint_of_the_last_step(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(monkeypatch)
    with pytest.raises(type(error)):
        stand.run(raising(3, error))
    assert stand.saved == [3]


def test_what_ends_a_recovery_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learners are no longer at the step of the state: a checkpoint would mix two steps."""
    stand = Stand(monkeypatch)

    def damaged(lost: LearnerLost) -> RunState | None:
        raise UserError("the checkpoint is damaged")

    stand.recover = damaged  # type: ignore[method-assign]
    with pytest.raises(UserError, match="damaged"):
        stand.run(raising(3, LearnerLost("dead")))
    assert stand.saved == []
