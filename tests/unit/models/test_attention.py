"""Attention over shared prompts in two parts: the same numbers and gradients as over whole rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmcot.config import Kernel
from lmcot.learner.vocabulary import token_logprobs
from lmcot.models.attention import attend, attend_by_products, cut_up, kernel_of, use_kernel
from lmcot.models.policy import response_logits, shares_prompts
from lmcot.models.sequences import Row, make_batch
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    Row([11, 12, 13, 14, 15, 16, 17], [[30, 31, 32, 1], [40, 1], [30, 31, 50]]),
    Row([18], [[60], [61, 62, 63, 64, 65, 66, 1], [70, 1]]),
    Row([19, 20, 21], [[80, 81, 82, 1]]),
    Row([22, 23], [[90], [91]]),
]
WAYS: list[Kernel] = ["fused", "products"]
SCALE = 0.3


def _tensors(
    rows: list[Row], heads: int, key_heads: int
) -> tuple[Any, Tensor, list[Tensor], Tensor]:
    batch = make_batch(rows, pad_id=0, start_id=None)
    visible = batch.attention_mask()
    chosen = torch.Generator().manual_seed(0)

    def made_up(number: int) -> Tensor:
        return torch.randn(len(rows), visible.shape[-1], number, 8, generator=chosen)

    inputs = [made_up(n).transpose(1, 2).requires_grad_() for n in (heads, key_heads, key_heads)]
    return batch, visible, inputs, made_up(heads)


@pytest.mark.parametrize("way", [attend, attend_by_products])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["padded", "one"])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (3, 3)])
def test_parts_are_the_whole(way: Any, rows: list[Row], heads: int, key_heads: int) -> None:
    batch, visible, inputs, gradient = _tensors(rows, heads, key_heads)
    query, key, value = inputs
    parts = cut_up(batch, visible, query.dtype)
    assert parts.cut == min(len(row.prompt) for row in rows)
    found = way(query, key, value, parts, SCALE)
    keys, values = (one.repeat_interleave(heads // key_heads, 1) for one in (key, value))
    whole = scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=SCALE)
    whole = whole.transpose(1, 2)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(found, inputs, gradient)
    for one, other in zip(ours, torch.autograd.grad(whole, inputs, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", WAYS)
def test_a_model_has_the_same_logits_and_gradients(tiny: TinyModel, kernel: Kernel) -> None:
    lm = copy.deepcopy(tiny("llama")[0])
    batch = make_batch(ROWS, pad_id=0, start_id=None)
    found: dict[Kernel, tuple[Tensor, list[Tensor]]] = {}
    ways: list[Kernel] = ["model", kernel]
    for way in ways:
        use_kernel(lm, way)
        assert kernel_of(lm) == way
        logits, _ = response_logits(lm, batch)
        loss = token_logprobs(logits, batch.targets).square().sum()
        found[way] = logits.detach(), list(torch.autograd.grad(loss, list(lm.parameters())))
    assert shares_prompts(lm, None)
    torch.testing.assert_close(found[kernel][0], found["model"][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(found[kernel][1], found["model"][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", WAYS)
def test_rows_that_share_nothing_are_read_as_before(tiny: TinyModel, kernel: Kernel) -> None:
    lm = copy.deepcopy(tiny("llama")[0])
    batch = make_batch(
        [Row(row.prompt, row.responses[:1]) for row in ROWS], pad_id=0, start_id=None
    )
    with torch.no_grad():
        before, _ = response_logits(lm, batch)
        use_kernel(lm, kernel)
        after, _ = response_logits(lm, batch)
    assert torch.equal(before, after)
