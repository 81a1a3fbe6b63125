"""The estimator of docs/extending.md, as it stands there: by hand, by its settings, in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcot.config import training
from lmcot.errors import UserError
from lmcot.learner import advantages
from lmcot.learner.advantages import AdvantageInputs, estimate
from tests.support.learner_cases import (
    LAYOUTS,
    STATELESS,
    distance,
    fixed_kl,
    make_config,
    open_session,
    parameters,
    rollouts,
)
from tests.support.learner_seams import add_to, parse_extended
from tests.support.worked import python_blocks

KIND = "counting-llama"
PRODUCT = dict(advantages.ESTIMATORS)


@pytest.fixture(autouse=True)
def followed_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, function = python_blocks("An advantage estimator")
    add_to(training, settings, monkeypatch)
    add_to(advantages, function, monkeypatch)


def test_the_page_leaves_the_products_estimators_as_they_are() -> None:
    assert {k: v for k, v in advantages.ESTIMATORS.items() if k != "ranked"} == PRODUCT


def test_its_advantages_by_hand() -> None:
    """Rewards after the KL penalty: 0.5, 3.0, 0.5 of one question, -1.0 and 2.0 of the other."""
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    inputs = AdvantageInputs(
        scores=torch.tensor([1.0, 3.0, 0.5, -1.0, 2.0]),
        kl=torch.tensor([[2.0, 3.0], [0.0, 9.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        kl_coefficient=0.1,
        values=torch.zeros(5, 2),
        mask=mask,
        groups=torch.tensor([0, 0, 0, 1, 1]),
    )
    settings: Any = vars(training)["Ranked"](kind="ranked")
    found, returns = estimate(settings, inputs)
    expected = torch.tensor([[-0.5, -0.5], [1.0, 0.0], [-0.5, -0.5], [-1.0, -1.0], [1.0, 0.0]])
    torch.testing.assert_close(found, expected)
    assert not returns.any()


def test_its_settings_say_that_it_compares_rationales() -> None:
    chosen = {"advantage": {"kind": "ranked"}}
    assert parse_extended(make_config(KIND), chosen).refine.advantage.needs_group
    with pytest.raises(UserError, match=r"'ranked' compares a question's rationales .* is 1"):
        parse_extended(make_config(KIND), {**chosen, "samples_per_prompt": 1})
    with pytest.raises(UserError, match=r"'refine\.advantage\.kind' is 'rank': choose one of"):
        parse_extended(make_config(KIND), {"advantage": {"kind": "rank"}})


@pytest.mark.usefixtures("one_thread", "model_cache")
def test_a_step_learns_from_it() -> None:
    """Of two rationales whose rewards are 0 and 1, ranks give what the leave-one-out baseline does.

    And unlike that, they give the same whatever the distance of the rewards is.
    """
    results = []
    questions = [(2, (3, 7)), (5, (2, 5))]
    for kind, rewards in (
        ("rloo", [1.0, 0.0, 0.0, 1.0]),
        ("ranked", [1.0, 0.0, 0.0, 1.0]),
        ("ranked", [7.0, 0.0, -2.0, 1e-3]),
    ):
        base = make_config(KIND, STATELESS, LAYOUTS[1], kl=fixed_kl(0.0))
        session = open_session(parse_extended(base, {"advantage": {"kind": kind}}))
        assert session.policy.critic is None
        before = parameters(session)
        metrics = session.ppo.step(rollouts(KIND, questions=questions, rewards=rewards), 0)
        assert "value/mean" not in metrics
        assert distance(before, parameters(session)) > 1e-2
        results.append((metrics["loss/policy"], parameters(session)))
    assert results[0][0] == results[1][0] == results[2][0]
    assert distance(results[0][1], results[1][1]) == distance(results[1][1], results[2][1]) == 0
