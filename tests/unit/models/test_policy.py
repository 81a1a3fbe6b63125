"""The learner's view of the small LM: logits, values, shared prompts, dropout, padding."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from lmcot.learner.maths import clipped_loss, value_loss
from lmcot.learner.vocabulary import token_logprobs
from lmcot.models.policy import (
    Policy,
    critic_model,
    disable_dropout,
    response_logits,
    shares_prompts,
    value_head,
)
from lmcot.models.sequences import Row, SequenceBatch, make_batch
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("kind", ["llama", "t5"])
PROMPTS = [[11, 12, 13, 14], [15], [16, 17]]
RESPONSES = [[30, 1], [40, 41, 42, 43, 1], [50, 51, 52]]
STARTS = [0, 2, 7, 10]
"""Where each response's tokens begin among those of a batch."""
SHARED = [
    Row([11, 12, 13, 14, 15, 16, 17], [[30, 31, 32, 1], [40, 1], [30, 31, 50]]),
    Row([18], [[60], [61, 62, 63, 64, 65, 66, 1], [70, 1]]),
    Row([19, 20, 21], [[80, 81, 82, 1]]),
    Row([22, 23], [[90], [91]]),
]


@torch.no_grad()
def _lm(tiny: TinyModel, kind: str) -> Any:
    """A tiny model whose layers do make a difference: the random T5's hardly do."""
    lm = copy.deepcopy(tiny(kind)[0])
    for name, parameter in lm.named_parameters():
        if kind == "t5" and ".layer." in name and parameter.dim() == 2:
            parameter.mul_(10)
    return lm


def _policy(tiny: TinyModel, kind: str, seed: int = 0) -> Policy:
    lm = _lm(tiny, kind)
    return Policy(lm, value_head(lm, seed))


def _batch(policy: Policy, responses: Sequence[Sequence[int]] = RESPONSES) -> SequenceBatch:
    rows = [Row(prompt, [response]) for prompt, response in zip(PROMPTS, responses, strict=True)]
    return make_batch(rows, pad_id=0, start_id=policy.start_id)


def _head(policy: Policy) -> nn.Linear:
    assert isinstance(policy.critic, nn.Linear)
    return policy.critic


def test_where_the_decoder_starts(tiny: TinyModel) -> None:
    """[5] T5's decoder starts with the pad token; a decoder-only model has no such token."""
    assert [_policy(tiny, kind).start_id for kind in ("llama", "t5")] == [None, 0]
    assert tiny("t5")[1].pad_token_id == 0


@BOTH
def test_logits_are_those_of_one_pass_for_each_token(tiny: TinyModel, kind: str) -> None:
    """[1] [5] against a hand loop that pads, shifts and caches nothing; values likewise."""
    policy = _policy(tiny, kind)
    seen: list[Tensor] = []
    with torch.no_grad():
        logits, values = policy(_batch(policy), values=True)
        assert values is not None
        assert logits.shape == (10, policy.lm.config.vocab_size)
        assert (values.shape, values.dtype) == ((10,), torch.float32)
        policy.lm.get_output_embeddings().register_forward_pre_hook(
            lambda _, arguments: seen.append(arguments[0][0, -1])
        )
        index = 0
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            for t in range(len(response)):
                if policy.start_id is None:
                    arguments = {"input_ids": torch.tensor([[*prompt, *response[:t]]])}
                else:
                    begun = torch.tensor([[policy.start_id, *response[:t]]])
                    arguments = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": begun}
                alone = policy.lm(**arguments).logits[0, -1]
                torch.testing.assert_close(logits[index], alone, atol=1e-5, rtol=0)
                value = _head(policy)(seen[-1])
                torch.testing.assert_close(values[index : index + 1], value, atol=1e-5, rtol=0)
                index += 1
    assert index == 10


@BOTH
def test_a_pad_token_that_is_also_eos(tiny: TinyModel, kind: str) -> None:
    """[4] the pad token's id matters nowhere, though responses end in it."""
    policy = _policy(tiny, kind)
    rows = [Row(p, [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        usual, _ = policy(_batch(policy), values=False)
        eos, _ = policy(make_batch(rows, pad_id=1, start_id=policy.start_id), values=False)
    torch.testing.assert_close(usual, eos, atol=1e-6, rtol=0)


@BOTH
def test_value_head_begins_near_zero(tiny: TinyModel, kind: str) -> None:
    """[24] value head initialised near zero: standard deviation 1 / (width + 1), bias 0."""
    policy = _policy(tiny, kind)
    weight = _head(policy).weight.detach()
    assert weight.shape == (1, 64)
    assert float(weight.std()) == pytest.approx(1 / 65, rel=0.3)
    assert float(_head(policy).bias.detach()) == 0
    with torch.no_grad():
        _, values = policy(_batch(policy), values=True)
    assert values is not None
    assert float(values.abs().max()) < 0.5
    assert torch.equal(weight, _head(_policy(tiny, kind)).weight)
    assert not torch.equal(weight, _head(_policy(tiny, kind, seed=1)).weight)


def test_value_head_has_the_models_dtype(tiny: TinyModel) -> None:
    """Its hidden states are fed to it as they are; the values come out in float32."""
    lm = copy.deepcopy(tiny("llama")[0]).bfloat16()
    policy = Policy(lm, value_head(lm, 0))
    assert _head(policy).weight.dtype == torch.bfloat16
    with torch.no_grad():
        logits, values = policy(_batch(policy), values=True)
    assert logits.dtype == torch.bfloat16
    assert values is not None
    assert values.dtype == torch.float32


@BOTH
def test_values_are_of_the_state_before_the_token(tiny: TinyModel, kind: str) -> None:
    """A value does not know its own token or later ones, but all the earlier ones."""
    policy = _policy(tiny, kind)
    with torch.no_grad():
        _head(policy).weight.mul_(50)
        logits, values = policy(_batch(policy), values=True)
        changed = [RESPONSES[0], [40, 41, 99, 43, 1], RESPONSES[2]]
        other_logits, other_values = policy(_batch(policy, changed), values=True)
    assert values is not None
    assert other_values is not None
    # Tokens 2 to 6 are the second response's; its third token is another.
    same = [0, 1, 2, 3, 4, 7, 8, 9]
    torch.testing.assert_close(values[same], other_values[same], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[same], other_logits[same], atol=1e-5, rtol=0)
    assert float((values[5:7] - other_values[5:7]).abs().min()) > 1e-2


@BOTH
def test_padding_changes_neither_logits_nor_values(tiny: TinyModel, kind: str) -> None:
    """[5] those of batch 1 equal those of a row of the batch, and of one padded further."""
    policy = _policy(tiny, kind)
    rows = [Row(p, [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    longer = Row(list(range(100, 120)), [list(range(200, 230))])
    with torch.no_grad():
        logits, values = policy(_batch(policy), values=True)
        further = make_batch([*rows, longer], pad_id=0, start_id=policy.start_id)
        far_logits, far_values = policy(further, values=True)
        torch.testing.assert_close(far_logits[:10], logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(far_values[:10], values, atol=1e-5, rtol=0)
        for row in range(3):
            alone = make_batch(rows[row : row + 1], pad_id=0, start_id=policy.start_id)
            own_logits, own_values = policy(alone, values=True)
            own = slice(STARTS[row], STARTS[row + 1])
            torch.testing.assert_close(own_logits, logits[own], atol=1e-5, rtol=0)
            torch.testing.assert_close(own_values, values[own], atol=1e-5, rtol=0)


@BOTH
def test_values_are_left_out_where_nobody_asks(tiny: TinyModel, kind: str) -> None:
    policy = _policy(tiny, kind)
    with torch.no_grad():
        logits, values = policy(_batch(policy), values=False)
        with_values, _ = policy(_batch(policy), values=True)
        _, without_critic = Policy(policy.lm)(_batch(policy), values=True)
    assert values is None
    assert without_critic is None
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


def _gradients(
    policy: Policy, batch: SequenceBatch, order: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, values, and the gradient of every parameter of a loss over all tokens.

    Args:
        order: of the tokens, if their advantages are to go by another one than the batch's.
    """
    policy.zero_grad()
    logits, values = policy(batch, values=True)
    logprobs = token_logprobs(logits, batch.targets)
    advantages = torch.linspace(-1, 1, len(logprobs))
    if order is not None:
        advantages = advantages[torch.tensor(order)]
    ratio = (logprobs - logprobs.detach() + 0.1).exp()
    policy_part = clipped_loss(ratio, advantages, 0.2, 0.2).loss
    value_part = value_loss(values, torch.zeros_like(values), advantages + 1, 0.2)
    (policy_part + value_part).mean().backward()
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    assert len(gradients) == len(list(policy.parameters()))
    return logits.detach(), values.detach(), gradients


def _assert_close(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> None:
    """Equal but for a share of the largest entry of each tensor."""
    for ours, theirs in zip(one, other, strict=True):
        scale = float(theirs.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours, theirs, atol=tolerance * scale, rtol=0)


@BOTH
def test_padding_adds_nothing_to_loss_and_gradient(tiny: TinyModel, kind: str) -> None:
    """[6] whatever stands at padded positions, logits, values and gradients are the same."""
    policy = _policy(tiny, kind)
    batch = _batch(policy)
    filled = batch.ids.where(batch.segments >= 0, torch.tensor(77))
    encoder = batch.encoder_ids
    if encoder is not None and batch.encoder_mask is not None:
        encoder = encoder.where(batch.encoder_mask.bool(), torch.tensor(78))
        assert int((encoder == 78).sum()) == 5
    assert int((filled == 77).sum()) > 0
    other = dataclasses.replace(batch, ids=filled, encoder_ids=encoder)
    expected, found = _gradients(policy, batch), _gradients(policy, other)
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-6, rtol=0)
    _assert_close(found[2], expected[2], 1e-5)


@BOTH
def test_gradient_checkpointing_changes_no_number(tiny: TinyModel, kind: str) -> None:
    """[8] recomputed activations are the same ones: dropout is off in train mode."""
    policy = _policy(tiny, kind).train()
    disable_dropout(policy)
    batch = make_batch(SHARED, pad_id=0, start_id=policy.start_id)
    _, _, plain = _gradients(policy, batch)
    policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    _, _, recomputed = _gradients(policy, batch)
    _assert_close(recomputed, plain, 1e-6)


@BOTH
@pytest.mark.parametrize("critic", ["head", "model"])
def test_a_shared_prompt_changes_no_number(tiny: TinyModel, kind: str, critic: str) -> None:
    """[22] responses behind one prompt have the logits, values and gradients of separate rows."""
    policy = _policy(tiny, kind)
    if critic == "model":
        policy = Policy(policy.lm, critic_model(policy.lm, 0))
    apart_rows = [Row(row.prompt, [response]) for row in SHARED for response in row.responses]
    together = make_batch(SHARED, pad_id=0, start_id=policy.start_id)
    apart = make_batch(apart_rows, pad_id=0, start_id=policy.start_id)
    assert together.shared
    assert not apart.shared
    if kind == "llama":
        assert (together.ids.numel(), apart.ids.numel()) == (4 * 13, 9 * 10)
    ours, theirs = _gradients(policy, together), _gradients(policy, apart)
    torch.testing.assert_close(ours[:2], theirs[:2], atol=2e-6, rtol=1e-5)
    _assert_close(ours[2], theirs[2], 5e-6)


@BOTH
def test_shared_rows_one_by_one(tiny: TinyModel, kind: str) -> None:
    """[22] the gradient of a batch is the sum of those of its rows, whatever their order."""
    policy = _policy(tiny, kind)
    turned = make_batch(SHARED[::-1], pad_id=0, start_id=policy.start_id)
    batch = make_batch(SHARED, pad_id=0, start_id=policy.start_id)
    counts = [sum(map(len, row.responses)) for row in SHARED]
    begins = [sum(counts[:number]) for number in range(len(SHARED))]
    order = [begins[n] + t for n in reversed(range(len(SHARED))) for t in range(counts[n])]
    ours, theirs = _gradients(policy, turned, order), _gradients(policy, batch)
    torch.testing.assert_close(ours[0], theirs[0][order], atol=2e-6, rtol=1e-5)
    _assert_close(ours[2], theirs[2], 5e-6)


@BOTH
def test_the_tiny_models_share_prompts(tiny: TinyModel, kind: str) -> None:
    policy = _policy(tiny, kind)
    assert shares_prompts(policy.lm, policy.start_id)
    assert shares_prompts(copy.deepcopy(policy.lm).bfloat16(), policy.start_id)
    assert shares_prompts(critic_model(policy.lm, 0), policy.start_id)


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def _mistral(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**TINY, **settings))


def test_models_with_a_sliding_window_do_not_share_prompts() -> None:
    """The window is longer than the prompts of the trial, which would not show it."""
    assert not shares_prompts(_mistral(sliding_window=64), None)
    assert shares_prompts(_mistral(sliding_window=None), None), "else the test would show nothing"
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**TINY))
    assert set(gemma.config.layer_types) == {"sliding_attention", "full_attention"}
    assert not shares_prompts(gemma, None)


def test_rounding_in_16_bits_does_not_count() -> None:
    """SmolLM2 has 30 layers: in bfloat16 its logits move by a fifth of their spread."""
    torch.manual_seed(0)
    deep = LlamaConfig(**{**TINY, "num_hidden_layers": 30, "initializer_range": 0.2})
    lm = LlamaForCausalLM(deep).bfloat16()
    prompt, responses = list(range(3, 33)), [list(range(9, 60)), list(range(40, 50))]
    rows, alone = [Row(prompt, responses)], [Row(prompt, [one]) for one in responses]
    with torch.no_grad():
        together, apart = (
            response_logits(lm, make_batch(one, pad_id=0, start_id=None))[0].float()
            for one in (rows, alone)
        )
    assert (together - apart).abs().max() > 0.01 * apart.std(), "else this shows nothing"
    assert shares_prompts(lm, None)
    assert lm.dtype == torch.bfloat16


def test_a_model_that_takes_the_mask_otherwise_does_not_share_prompts(tiny: TinyModel) -> None:
    """Eager attention adds the mask to its scores: as True and False it means nothing there."""
    lm = copy.deepcopy(tiny("llama")[0])
    lm.set_attn_implementation("eager")
    assert not shares_prompts(lm, None)


def test_a_model_that_places_tokens_by_itself_does_not_share_prompts() -> None:
    """Bloom makes its biases by distance from a mask [rows, length], and fails at another."""
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))
    assert not shares_prompts(bloom, None)


class _PlacesByColumn(LlamaForCausalLM):
    """Takes any mask, but counts positions by the column."""

    def forward(self, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        columns = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        return super().forward(*args, position_ids=columns, **kwargs)


def test_a_model_that_ignores_positions_does_not_share_prompts(tiny: TinyModel) -> None:
    lm = copy.deepcopy(tiny("llama")[0])
    lm.__class__ = _PlacesByColumn
    batch = make_batch([Row([5, 6], [[7, 8]])], pad_id=0, start_id=None)
    torch.testing.assert_close(response_logits(lm, batch), response_logits(tiny("llama")[0], batch))
    assert not shares_prompts(lm, None)


def test_a_model_with_learned_positions_shares_prompts() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    assert shares_prompts(gpt2.eval(), None)


@contextmanager
def _read_by(layer: nn.Module) -> Iterator[list[torch.Size]]:
    """Shapes of what a layer is really given, after all that changes its input."""
    shapes: list[torch.Size] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...], __: Tensor) -> None:
        shapes.append(arguments[0].shape)

    handle = layer.register_forward_hook(note)
    yield shapes
    handle.remove()


@BOTH
def test_the_output_layer_reads_response_positions_only(tiny: TinyModel, kind: str) -> None:
    """Of 52 places (T5: 40) the 25 that predict a token: no prompt and no padding."""
    policy = _policy(tiny, kind)
    batch = make_batch(SHARED, pad_id=0, start_id=policy.start_id)
    output = policy.lm.get_output_embeddings()
    with _read_by(output) as shapes, torch.no_grad():
        logits, hidden = response_logits(policy.lm, batch)
        assert shapes == [(1, 25, 64)]
        assert batch.ids.numel() == {"llama": 52, "t5": 40}[kind]
        torch.testing.assert_close(output(hidden), logits)
        shapes.clear()
        policy.lm(**_whole(policy))
    assert shapes == [(1, 3, 64)], "what follows reads all positions again"


def _whole(policy: Policy) -> dict[str, Tensor]:
    ids = torch.tensor([[5, 6, 7]])
    return {"input_ids": ids} if policy.start_id is None else {
        "input_ids": ids, "decoder_input_ids": ids,
    }  # fmt: skip


@BOTH
def test_the_output_layer_is_as_before_after_an_error(tiny: TinyModel, kind: str) -> None:
    """A pass that fails, as the trial of `shares_prompts` may, leaves no hook behind."""
    policy = _policy(tiny, kind)
    batch = _batch(policy)
    broken = dataclasses.replace(batch, ids=batch.ids + 10_000)
    with pytest.raises(IndexError):
        response_logits(policy.lm, broken)
    with _read_by(policy.lm.get_output_embeddings()) as shapes, torch.no_grad():
        policy.lm(**_whole(policy))
    assert shapes == [(1, 3, 64)]


def _sum_of_values(policy: Policy, *, head_only: bool = False) -> None:
    policy.zero_grad()
    _, values = policy(_batch(policy), values=True, head_only=head_only)
    values.sum().backward()


def _touched(module: nn.Module) -> int:
    """Number of parameters that have a gradient."""
    return sum(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@BOTH
def test_a_critic_model_is_separate(tiny: TinyModel, kind: str) -> None:
    """[24] a critic with a trunk of its own: near zero at first, no gradient to the policy."""
    lm = _lm(tiny, kind)
    before = copy.deepcopy(lm.state_dict())
    policy = Policy(lm, critic_model(lm, 0))
    assert policy.critic is not None
    with torch.no_grad():
        logits, values = policy(_batch(policy), values=True)
        alone, _ = response_logits(_lm(tiny, kind), _batch(policy))
        _, of_head = _policy(tiny, kind)(_batch(policy), values=True)
    assert torch.equal(logits, alone)
    assert values.shape == (10,)
    assert float(values.abs().max()) < 0.5
    # It begins as the same trunk with the same head.
    torch.testing.assert_close(values, of_head, atol=1e-6, rtol=0)
    _sum_of_values(policy)
    assert _touched(policy.lm) == 0
    assert _touched(policy.critic) == len(list(policy.critic.parameters()))
    with torch.no_grad():
        for parameter in policy.critic.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())


@BOTH
def test_a_head_moves_the_trunk_unless_told_not_to(tiny: TinyModel, kind: str) -> None:
    """[24] warm-up of the critic: the values' gradient ends at the head."""
    policy = _policy(tiny, kind)
    _sum_of_values(policy)
    with_trunk = _head(policy).weight.grad
    assert _touched(policy.lm) > 10
    _sum_of_values(policy, head_only=True)
    assert _touched(policy.lm) == 0
    assert _touched(_head(policy)) == 2
    assert torch.equal(_head(policy).weight.grad, with_trunk)  # type: ignore[arg-type]
