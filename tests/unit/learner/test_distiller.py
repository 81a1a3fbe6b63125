"""Distillation through the real DeepSpeed engine, on models of a few tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lmcot.errors import UserError
from lmcot.learner.batching import TokenPair
from lmcot.learner.vocabulary import token_logprobs
from lmcot.models.policy import Policy
from lmcot.models.sources import load_model
from lmcot.records import Rollout, RunState
from tests.support.learner_by_hand import (
    alone,
    global_norm,
    gradients,
    plain_policy,
    stateless_step,
)
from tests.support.learner_cases import (
    BOTH,
    KINDS,
    LAYOUTS,
    LORA,
    STATELESS,
    TOKENS,
    Layout,
    distance,
    make_config,
    moved,
    open_session,
    parameters,
    token_pairs,
)

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

LLAMA = "counting-llama"


def _mean_by_hand(policy: Policy, pairs: list[TokenPair]) -> Tensor:
    """Mean negative log-likelihood, by a loop over single responses."""
    loss = torch.zeros(())
    for prompt, response in pairs:
        one = Rollout("", "", 0, tuple(prompt), tuple(response), (), "eos", "", 0)
        loss = loss - alone(policy.lm, None, one).logprobs.sum()
    return loss / sum(len(response) for _, response in pairs)


@BOTH
@pytest.mark.parametrize(
    ("layout", "max_grad_norm"),
    [*((layout, 0.05) for layout in LAYOUTS), (LAYOUTS[1], 1e6), (LAYOUTS[3], 1e6)],
    ids=str,
)
def test_one_step_by_hand(kind: str, layout: Layout, max_grad_norm: float) -> None:
    """[22] [25] token mean over the whole step, clipped by its global norm, by a plain loop."""
    config = make_config(kind, {**STATELESS, "max_grad_norm": max_grad_norm}, layout)
    session = open_session(config, "distill")
    policy = plain_policy(config, critic=False)
    loss = _mean_by_hand(policy, token_pairs())
    found = gradients(policy, loss)
    norm = global_norm(found)
    assert norm > 0.1
    before = parameters(session)
    metrics = session.distiller.step(token_pairs())
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["optimiser/grad_norm"] == pytest.approx(norm, rel=1e-4), "before clipping"
    assert metrics["batch/tokens"] == TOKENS
    assert metrics["optimiser/skipped_updates"] == 0
    expected = stateless_step(before, found, min(1.0, max_grad_norm / norm))
    assert distance(expected, before) > 1e-3
    assert distance(parameters(session), expected) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_rationales_does_not_matter(kind: str) -> None:
    """[22] shuffled rows, cut into other micro-batches: the same two steps."""
    results = []
    for order, layout in enumerate(LAYOUTS[:4]):
        session = open_session(make_config(kind, STATELESS, layout), "distill")
        metrics = {}
        for step in range(2):
            pairs = token_pairs(step)
            random.Random(order).shuffle(pairs)
            metrics = session.distiller.step(pairs)
        results.append((parameters(session), metrics))
    for found, metrics in results[1:]:
        assert distance(found, results[0][0]) < 2e-6
        assert metrics == pytest.approx(results[0][1], rel=1e-5)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.2, 0.4, 0.6, 0.8, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_learning_rate_is_a_function_of_the_step(
    tmp_path: Path, decay: str, expected: list[float]
) -> None:
    """[25] schedules are functions of the step, not of the process's age."""
    optimiser = {"learning_rate": 1e-3, "warmup_steps": 4, "decay": decay}
    config = make_config(LLAMA, optimiser)
    session = open_session(config, "distill", steps=8)
    rates = [
        session.distiller.step(token_pairs(step))["optimiser/learning_rate"] for step in range(3)
    ]
    session.save_engine(tmp_path)
    rates += [
        session.distiller.step(token_pairs(step))["optimiser/learning_rate"] for step in range(3, 8)
    ]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])
    again = open_session(config, "distill", steps=8)
    again.restore(tmp_path, RunState("distill"))
    resumed = [
        again.distiller.step(token_pairs(step))["optimiser/learning_rate"] for step in range(3, 8)
    ]
    assert resumed == rates[3:]


@pytest.mark.parametrize(("kind", "stage"), [(LLAMA, 2), (LLAMA, 3), ("counting-t5", 0)])
def test_a_resumed_distillation_is_the_same_to_the_bit(
    tmp_path: Path, kind: str, stage: int
) -> None:
    """[29] N + M steps equal N steps, a new session, M steps; gradient checkpointing included."""
    config = make_config(
        kind,
        {"learning_rate": 1e-2, "decay": "linear"},
        Layout(stage, 40, True),
        learner__gradient_checkpointing=True,
    )
    straight = open_session(config, "distill", steps=4)
    metrics = []
    for step in range(4):
        metrics.append(straight.distiller.step(token_pairs(step)))
        if step == 1:
            straight.save_engine(tmp_path)
    resumed = open_session(config, "distill", steps=4)
    before = parameters(resumed)
    resumed.restore(tmp_path, RunState("distill", 2))
    again = [resumed.distiller.step(token_pairs(step)) for step in range(2, 4)]
    assert again == metrics[2:]
    assert not moved(parameters(resumed), parameters(straight))
    assert distance(parameters(resumed), before) > 1e-3


@pytest.mark.parametrize(
    ("kind", "stage", "lora"),
    [(LLAMA, 0, None), (LLAMA, 3, None), (LLAMA, 3, LORA), ("counting-t5", 2, None)],
)
def test_the_present_weights_write(
    tmp_path: Path, kind: str, stage: int, lora: dict[str, Any] | None
) -> None:
    """What they write after some steps is what the exported model writes; training stays as is."""
    changes: dict[str, Any] = {"learner__gradient_checkpointing": True, "policy__lora": lora}
    config = make_config(kind, {"learning_rate": 3e-2}, Layout(stage, 40, True), **changes)
    session, silent = open_session(config, "distill"), open_session(config, "distill")
    prompts = [pair[0] for pair in token_pairs()]
    first = session.write_greedily(prompts, 6)
    for step in range(12):
        assert session.distiller.step(token_pairs()) == silent.distiller.step(token_pairs())
        if step == 5:
            session.write_greedily(prompts, 6)
    written = session.write_greedily(prompts, 6)
    assert len(written) == len(prompts)
    assert written != first
    silent.export(tmp_path / "model")
    source = config.policy.source if lora else str(tmp_path / "model")
    lm, tokenizer = load_model(source, "float32")
    if lora:
        lm = PeftModel.from_pretrained(lm, str(tmp_path / "model"))
    by_hand = []
    for prompt in prompts:
        ids = lm.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0]
        own = ids[1:] if lm.config.is_encoder_decoder else ids[len(prompt) :]
        by_hand.append(tokenizer.decode(own, skip_special_tokens=True).strip())
    assert written == by_hand


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_distillation_learns(lora: dict[str, Any] | None) -> None:
    """The loss of one batch falls by half, by a quarter with adapters: their base stays."""
    config = make_config(LLAMA, {"learning_rate": 1e-2}, policy__lora=lora)
    session = open_session(config, "distill", steps=30)
    frozen = {n: p.detach().clone() for n, p in session.policy.named_parameters()}
    frozen = {n: p for n, p in frozen.items() if n not in parameters(session)}
    assert bool(frozen) == bool(lora)
    losses = [session.distiller.step(token_pairs())["loss"] for _ in range(30)]
    assert losses[-1] < losses[0] * (0.75 if lora else 0.5)
    assert all(torch.equal(session.policy.get_parameter(n), p) for n, p in frozen.items())


@BOTH
@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[4]], ids=str)
def test_answers_are_a_second_term_of_the_loss(kind: str, layout: Layout) -> None:
    """Each task is a mean over its own tokens, whatever micro-batches they share."""
    config = make_config(kind, STATELESS, layout)
    session, rationales, answers = (
        open_session(config, "distill"),
        token_pairs(),
        token_pairs(3)[:3],
    )
    policy = plain_policy(config, critic=False)
    losses = [_mean_by_hand(policy, pairs) for pairs in (rationales, answers)]
    found = gradients(policy, losses[0] + 0.3 * losses[1])
    before = parameters(session)
    measured = session.distiller.validate(rationales, answers)
    metrics = session.distiller.step(rationales, answers, 0.3)
    for name, loss in zip(("loss", "loss/answer"), losses, strict=True):
        assert metrics[name] == pytest.approx(loss.item(), abs=1e-5)
        assert measured[name] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["batch/tokens"] == TOKENS + sum(len(response) for _, response in answers)
    assert distance(parameters(session), stateless_step(before, found, 1.0)) < 2e-6


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_validation_loss_is_that_of_the_next_step(kind: str, layout: Layout) -> None:
    """It is measured by the weights as they are, and changes nothing."""
    config = make_config(kind, {"learning_rate": 1e-2}, layout)
    plain, validated = open_session(config, "distill"), open_session(config, "distill")
    for step in range(2):
        loss = validated.distiller.validate(token_pairs(step))["loss"]
        metrics = validated.distiller.step(token_pairs(step))
        assert loss == pytest.approx(metrics["loss"], rel=1e-6)
        assert metrics == plain.distiller.step(token_pairs(step))
    assert not moved(parameters(validated), parameters(plain))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_bad_update_is_as_if_it_had_not_been(stage: int) -> None:
    """A loss that is no number is skipped and counted; too many in a row end the run."""
    config = make_config(
        LLAMA,
        {"learning_rate": 1e-2, "decay": "linear"},
        Layout(stage, 24, True),
        learner__max_skipped_updates=1,
    )
    good, bad = open_session(config, "distill"), open_session(config, "distill")

    def nothing(*arguments: Any) -> Tensor:
        return plain(*arguments) * float("nan")

    plain = token_logprobs
    for step in range(2):
        with mock.patch("lmcot.learner.distiller.token_logprobs", nothing):
            skipped = bad.distiller.step(token_pairs(step))
        assert skipped["optimiser/skipped_updates"] == 1
        assert bad.distiller.step(token_pairs(step)) == good.distiller.step(token_pairs(step))
        assert not moved(parameters(good), parameters(bad))
    with mock.patch("lmcot.learner.distiller.token_logprobs", nothing):
        bad.distiller.step(token_pairs())
        with pytest.raises(UserError, match="2 updates in a row"):
            bad.distiller.step(token_pairs())
