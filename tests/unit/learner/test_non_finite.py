"""Updates whose loss or gradient is not finite: as if they had not been."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from lmcot.config import Config, OptimiserSettings
from lmcot.errors import UserError
from lmcot.learner import maths
from lmcot.learner.plan import LearnerPlan
from lmcot.learner.session import LearnerSession
from lmcot.records import RunState, ScoredRollout
from lmcot.training.learners import Learners
from tests.support.learner_cases import (
    LORA,
    Layout,
    make_config,
    moved,
    open_session,
    optimiser_state,
    parameters,
    rollouts,
    same,
)

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

LLAMA = "counting-llama"
NAN, INF = float("nan"), float("inf")


@contextmanager
def _bad_loss(_: LearnerSession) -> Iterator[None]:
    """The loss of a step's first micro-batch is no number."""
    plain, calls = maths.clipped_loss, []

    def changed(*arguments: Any) -> Any:
        calls.append(1)
        found = plain(*arguments)
        return found._replace(loss=found.loss * NAN) if len(calls) == 1 else found

    with mock.patch.object(maths, "clipped_loss", changed):
        yield
    assert len(calls) > 1, "else nothing finite was mixed in"


@contextmanager
def _bad_gradient(session: LearnerSession) -> Iterator[None]:
    """The loss is finite, but one number of one gradient is not."""
    layers: Any = session.policy.lm
    parameter = next(p for p in layers.parameters() if p.requires_grad)

    def changed(gradient: Any) -> Any:
        gradient = gradient.clone()
        gradient.view(-1)[3] = INF
        return gradient

    handle = parameter.register_hook(changed)
    yield
    handle.remove()


class Case(NamedTuple):
    stage: int
    dtype: str = "float32"
    offload: str = "none"
    lora: bool = False


CASES = (
    Case(0),
    Case(1),
    Case(2),
    Case(3),
    Case(0, "bfloat16"),
    Case(1, "bfloat16"),
    Case(2, "bfloat16"),
    Case(1, "bfloat16", "optimiser"),
    Case(2, "bfloat16", "optimiser"),
    Case(3, "float32", "optimiser_and_parameters"),
    Case(2, lora=True),
)


def _config(case: Case, **changes: Any) -> Config:
    return make_config(
        LLAMA,
        {"learning_rate": 1e-2, "decay": "linear", "weight_decay": 0.1},
        Layout(case.stage, 40, True),
        policy__dtype=case.dtype,
        learner__offload=case.offload,
        policy__lora=LORA if case.lora else None,
        **changes,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_update_is_as_if_it_had_not_been(case: Case) -> None:
    """Parameters, Adam's state and the schedule stay to the bit; what follows is the same too."""
    good, bad = open_session(_config(case)), open_session(_config(case))
    for session in (good, bad):
        session.ppo.step(rollouts(LLAMA), 0)
    before, state = parameters(bad), optimiser_state(bad._engine)
    for poison in (_bad_loss, _bad_gradient):
        with poison(bad):
            metrics = bad.ppo.step(rollouts(LLAMA, seed=7), 1)
        assert (metrics["optimiser/updates"], metrics["optimiser/skipped_updates"]) == (0, 1)
        assert not moved(before, parameters(bad))
        assert same(state, optimiser_state(bad._engine))
        assert bad.updates() == 1
    metrics = bad.ppo.step(rollouts(LLAMA, seed=1), 1)
    assert metrics == good.ppo.step(rollouts(LLAMA, seed=1), 1)
    assert (metrics["optimiser/updates"], metrics["optimiser/skipped_updates"]) == (1, 0)
    assert not moved(parameters(good), parameters(bad))
    assert same(optimiser_state(good._engine), optimiser_state(bad._engine))
    assert moved(before, parameters(bad))
    assert good.updates() == bad.updates() == 2


def test_a_log_probability_that_is_no_number_costs_one_minibatch() -> None:
    """The one that holds it; the others of the step are learnt from, and the KL stays finite."""
    scored = rollouts(LLAMA)
    logprobs = (NAN, *scored[1].rollout.logprobs[1:])
    scored[1] = replace(scored[1], rollout=replace(scored[1].rollout, logprobs=logprobs))
    session = open_session(make_config(LLAMA, {"learning_rate": 1e-3}, epochs=2, minibatches=3))
    metrics = session.ppo.step(scored, 0)
    assert (metrics["optimiser/updates"], metrics["optimiser/skipped_updates"]) == (4, 2)
    assert 0 < metrics["optimiser/grad_norm"] < INF
    assert session.ppo.step(rollouts(LLAMA), 1)["optimiser/skipped_updates"] == 0


@pytest.mark.parametrize("stage", [0, 2])
def test_too_many_in_a_row_end_the_run(tmp_path: Path, stage: int) -> None:
    """A good update between them counts anew; the last checkpoint is as good as before."""
    config = _config(Case(stage), learner__max_skipped_updates=2)
    batch = rollouts(LLAMA)

    def begin() -> LearnerSession:
        session = open_session(config)
        session.ppo.step(batch, 0)
        return session

    def poisoned(session: LearnerSession, scored: list[ScoredRollout]) -> None:
        with _bad_gradient(session):
            session.ppo.step(scored, 1)

    session = begin()
    session.save_engine(tmp_path)
    poisoned(session, batch)
    poisoned(session, batch)
    session.ppo.step(batch, 1)
    poisoned(session, batch)
    poisoned(session, batch)
    with pytest.raises(UserError, match=r"3 updates in a row .* learner\.max_skipped_updates"):
        poisoned(session, batch)

    straight, resumed = begin(), open_session(config)
    state = RunState("refine", 1, kl_controller=session.ppo.kl_controller.state())
    resumed.restore(tmp_path, state)
    assert resumed.updates() == 1
    assert resumed.ppo.step(batch, 1) == straight.ppo.step(batch, 1)
    assert not moved(parameters(resumed), parameters(straight))


def test_the_first_may_be_one_too_many() -> None:
    session = open_session(_config(Case(2), learner__max_skipped_updates=0))
    session.ppo.step(rollouts(LLAMA), 0)
    with pytest.raises(UserError, match="1 updates in a row"), _bad_gradient(session):
        session.ppo.step(rollouts(LLAMA), 1)


@pytest.mark.parametrize("stage", ["distill", "refine"])
def test_a_stage_whose_every_update_was_skipped_has_learned_nothing(stage: Any) -> None:
    learners = Learners.__new__(Learners)
    learners._plan = LearnerPlan(stage, "a/model", 3, OptimiserSettings(learning_rate=1e-5))
    with mock.patch.object(Learners, "updates", return_value=1):
        learners.check_learned()
    with (
        mock.patch.object(Learners, "updates", return_value=0),
        pytest.raises(UserError, match=f"{stage} has learned nothing: .* weights of 'a/model'"),
    ):
        learners.check_learned()
