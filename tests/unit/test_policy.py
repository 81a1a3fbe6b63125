"""The learner's view of the small LM: batches, values, dropout, padding."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lmcot.learner.maths import masked_mean, policy_loss, token_logprobs, value_loss
from lmcot.models.policy import Policy, SequenceBatch, disable_dropout, make_batch
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("kind", ["llama", "t5"])
PROMPTS = [[11, 12, 13, 14], [15], [16, 17]]
RESPONSES = [[30, 1], [40, 41, 42, 43, 1], [50, 51, 52]]


def _policy(tiny: TinyModel, kind: str, seed: int = 0) -> Policy:
    return Policy(copy.deepcopy(tiny(kind)[0]), seed=seed)


def _batch(policy: Policy) -> SequenceBatch:
    return make_batch(PROMPTS, RESPONSES, pad_id=0, encoder_decoder=policy.encoder_decoder)


def test_layout_of_a_decoder_only_batch() -> None:
    batch = make_batch([[5, 6, 7], [8]], [[9], [10, 11]], pad_id=0, encoder_decoder=False)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.response_ids.tolist() == [[9, 0], [10, 11]]
    assert batch.response_mask.tolist() == [[1, 0], [1, 1]]


def test_layout_of_an_encoder_decoder_batch() -> None:
    """[5] the encoder's input is padded on the right, with its mask."""
    batch = make_batch([[5, 6, 7], [8]], [[9], [10, 11]], pad_id=0, encoder_decoder=True)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.prompt_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.response_ids.tolist() == [[9, 0], [10, 11]]
    assert batch.response_mask.tolist() == [[1, 0], [1, 1]]


@BOTH
def test_value_head_begins_near_zero(tiny: TinyModel, kind: str) -> None:
    """[24] value head initialised near zero: standard deviation 1 / (width + 1), bias 0."""
    policy = _policy(tiny, kind)
    weight = policy.value_head.weight.detach()
    assert weight.shape == (1, 64)
    assert float(weight.std()) == pytest.approx(1 / 65, rel=0.3)
    assert float(policy.value_head.bias.detach()) == 0
    with torch.no_grad():
        _, values = policy(_batch(policy), values=True)
    assert values is not None
    assert float(values.abs().max()) < 0.5
    assert torch.equal(weight, _policy(tiny, kind).value_head.weight)
    assert not torch.equal(weight, _policy(tiny, kind, seed=1).value_head.weight)


@BOTH
def test_values_are_of_the_state_before_the_token(tiny: TinyModel, kind: str) -> None:
    """A value does not know its own token or later ones, but all the earlier ones."""
    policy = _policy(tiny, kind)
    with torch.no_grad():
        policy.value_head.weight.mul_(50)
        logits, values = policy(_batch(policy), values=True)
        changed = [*RESPONSES]
        changed[1] = [40, 41, 99, 43, 1]
        other = make_batch(PROMPTS, changed, pad_id=0, encoder_decoder=policy.encoder_decoder)
        other_logits, other_values = policy(other, values=True)
    assert values is not None
    assert other_values is not None
    assert values.dtype == torch.float32
    assert values.shape == logits.shape[:2] == (3, 5)
    torch.testing.assert_close(values[1, :3], other_values[1, :3], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, :3], other_logits[1, :3], atol=1e-5, rtol=0)
    assert float((values[1, 3:] - other_values[1, 3:]).abs().max()) > 1e-2


@BOTH
def test_values_do_not_depend_on_padding(tiny: TinyModel, kind: str) -> None:
    """[5] values of batch 1 equal those of a row of the batch."""
    policy = _policy(tiny, kind)
    with torch.no_grad():
        _, together = policy(_batch(policy), values=True)
        for row in range(3):
            alone = make_batch(
                PROMPTS[row : row + 1],
                RESPONSES[row : row + 1],
                pad_id=0,
                encoder_decoder=policy.encoder_decoder,
            )
            _, values = policy(alone, values=True)
            torch.testing.assert_close(
                values[0], together[row, : len(RESPONSES[row])], atol=1e-5, rtol=0
            )


@BOTH
def test_values_are_left_out_where_nobody_asks(tiny: TinyModel, kind: str) -> None:
    policy = _policy(tiny, kind)
    with torch.no_grad():
        logits, values = policy(_batch(policy), values=False)
        with_values, _ = policy(_batch(policy), values=True)
    assert values is None
    assert torch.equal(logits, with_values)


@BOTH
def test_dropout_is_off_in_train_mode(tiny: TinyModel, kind: str) -> None:
    """[8] two passes in train mode are equal to the bit, and to evaluation mode; no dropout."""
    policy = _policy(tiny, kind).train()
    batch = _batch(policy)
    if kind == "t5":
        assert policy.lm.config.dropout_rate == 0.1
        with torch.no_grad():
            first, second = (policy(batch, values=True)[0] for _ in range(2))
        assert not torch.equal(first, second), "else the test would show nothing"
    disable_dropout(policy)
    assert policy.training
    with torch.no_grad():
        first, first_values = policy(batch, values=True)
        second, second_values = policy(batch, values=True)
        policy.eval()
        third, third_values = policy(batch, values=True)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert torch.equal(first_values, second_values)
    assert torch.equal(first_values, third_values)
    if kind == "t5":
        assert policy.lm.config.dropout_rate == 0.1, "a saved model trains as before elsewhere"


def _gradients(policy: Policy, batch: SequenceBatch) -> tuple[float, list[Tensor], Tensor]:
    """Loss, gradient of every parameter, and gradient to the logits."""
    policy.zero_grad()
    logits, values = policy(batch, values=True)
    logits.retain_grad()
    mask = batch.response_mask.float()
    logprobs = token_logprobs(logits, batch.response_ids)
    advantages = torch.linspace(-1, 1, mask.numel()).reshape(mask.shape)
    policy_part, _ = policy_loss(logprobs, logprobs.detach() - 0.1, advantages, 0.2)
    value_part = value_loss(values, torch.zeros_like(mask), torch.ones_like(mask), 0.2)
    loss = masked_mean(policy_part + value_part, mask)
    loss.backward()
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    return loss.item(), gradients, logits.grad


@BOTH
def test_padding_adds_nothing_to_loss_and_gradient(tiny: TinyModel, kind: str) -> None:
    """[6] whatever stands at padded positions, loss and gradient are the same; theirs is 0."""
    policy = _policy(tiny, kind)
    batch = _batch(policy)

    def filled(ids: Tensor, mask: Tensor, token: int) -> Tensor:
        return torch.where(mask.bool(), ids, torch.full_like(ids, token))

    other = dataclasses.replace(
        batch,
        prompt_ids=filled(batch.prompt_ids, batch.prompt_mask, 77),
        response_ids=filled(batch.response_ids, batch.response_mask, 78),
    )
    assert not torch.equal(batch.prompt_ids, other.prompt_ids)
    loss, gradients, to_logits = _gradients(policy, batch)
    other_loss, other_gradients, _ = _gradients(policy, other)
    assert other_loss == pytest.approx(loss, abs=1e-6)
    assert len(gradients) == len(list(policy.parameters()))
    for one, another in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, another, atol=1e-6, rtol=1e-5)
    outside = to_logits[batch.response_mask == 0]
    assert outside.numel() > 0
    assert float(outside.abs().max()) == 0
    assert float(to_logits[batch.response_mask == 1].abs().max()) > 0


@BOTH
def test_gradient_checkpointing_changes_no_number(tiny: TinyModel, kind: str) -> None:
    """[8] recomputed activations are the same ones: dropout is off in train mode."""
    policy = _policy(tiny, kind).train()
    disable_dropout(policy)
    batch = _batch(policy)
    _, plain, _ = _gradients(policy, batch)
    policy.lm.gradient_checkpointing_enable()
    _, recomputed, _ = _gradients(policy, batch)
    for one, another in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, another, atol=1e-7, rtol=1e-6)


def test_policy_knows_its_architecture(tiny: TinyModel) -> None:
    kinds: dict[str, Any] = {kind: _policy(tiny, kind).encoder_decoder for kind in ("llama", "t5")}
    assert kinds == {"llama": False, "t5": True}
