"""The learner's attention over rows of a prompt and its responses, in two parts.

A row reads ``prompt r1 r2 ...``. Up to the end of a batch's shortest prompt, attention is plainly
causal: torch's fused kernel skips what lies ahead there, and needs no mask. Only the queries behind
it need one. The keys of grouped heads are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lmcot.config import Kernel
from lmcot.models.sequences import SequenceBatch

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
_PREFIX = "lmcot_"


class Parts(NamedTuple):
    """Where a batch's rows are cut, and what is visible behind the cut."""

    cut: int
    """Columns before it are plainly causal in every row."""
    bias: Tensor
    """[rows, 1, length - cut, length]: 0 where a key is visible, else -inf"""


_parts: ContextVar[Parts | None] = ContextVar("parts", default=None)


def cut_up(batch: SequenceBatch, visible: Tensor, dtype: torch.dtype) -> Parts:
    """Cuts a batch of a decoder-only model at the end of its shortest prompt.

    Args:
        visible: the batch's attention mask, on the model's device.
        dtype: of the queries.
    """
    cut = int((batch.segments == 0).sum(1).min())
    seen = visible[:, :, cut:]
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return Parts(cut, bias.masked_fill_(~seen, -torch.inf))


@contextmanager
def in_parts(parts: Parts) -> Iterator[None]:
    """Tells the attention of the models that run inside the block how the batch is cut."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)


def layer_of(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """The function that transformers calls for each layer's attention."""
    own: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
    return {"model": own, "fused": _by_fused, "products": _by_products}[kernel]


def use_kernel(lm: Any, kernel: Kernel) -> None:
    """Has a model's attention layers use a kernel.

    Raises:
        ValueError: if the model's attention cannot be replaced.
    """
    if kernel_of(lm) == kernel:
        return
    _register()
    lm.set_attn_implementation("sdpa" if kernel == "model" else _PREFIX + kernel)
    if kernel_of(lm) != kernel:
        raise ValueError(f"the attention of {type(lm).__name__} cannot be replaced")


def kernel_of(lm: Any) -> Kernel:
    """The kernel that a model's attention layers use; ``model`` is its own."""
    name = str(lm.config._attn_implementation).removeprefix(_PREFIX)
    return next((kernel for kernel in KERNELS if kernel == name), "model")


def can_cut(lm: Any) -> bool:
    """Whether a model's attention can be computed in parts, if its results are also the same.

    Biases by distance (T5) have gradients, which torch's fused kernel does not compute.
    """
    return bool(
        not getattr(lm.config, "is_encoder_decoder", False)
        and getattr(lm, "_supports_attention_backend", False)
        and lm.config._attn_implementation == "sdpa"
    )


def attend(query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float) -> Tensor:
    """Attention by torch's fused kernel.

    Args:
        query: [rows, heads, length, width]
        key, value: [rows, key heads, length, width]; ``heads`` is a multiple of ``key heads``.

    Returns:
        [rows, length, heads, width]
    """
    cut, bias = parts
    grouped = query.shape[1] != key.shape[1]
    before = scaled_dot_product_attention(
        query[:, :, :cut],
        key[:, :, :cut],
        value[:, :, :cut],
        is_causal=True,
        scale=scale,
        enable_gqa=grouped,
    )
    behind = scaled_dot_product_attention(
        query[:, :, cut:], key, value, attn_mask=bias, scale=scale, enable_gqa=grouped
    )
    return torch.cat([before.transpose(1, 2), behind.transpose(1, 2)], 1)


class _Products(torch.autograd.Function):
    """`attend`, whose backward pass computes the weights again and multiplies whole matrices.

    In bfloat16 on a processor with matrix units this is faster than the fused kernel's.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, parts.bias)
        ctx.cut, ctx.scale = parts.cut, scale
        return attend(query, key, value, parts, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, bias = ctx.saved_tensors
        cut: int = ctx.cut
        gradient = gradient.transpose(1, 2)
        ahead = torch.full((cut, cut), -torch.inf, dtype=bias.dtype, device=bias.device).triu_(1)
        before, d_key, d_value = _gradients(
            (query[:, :, :cut], key[:, :, :cut], value[:, :, :cut]),
            gradient[:, :, :cut],
            ahead.expand(len(bias), 1, -1, -1),
            ctx.scale,
        )
        behind, found_key, found_value = _gradients(
            (query[:, :, cut:], key, value), gradient[:, :, cut:], bias, ctx.scale
        )
        found_key[:, :, :cut] += d_key
        found_value[:, :, :cut] += d_value
        return torch.cat([before, behind], 2), found_key, found_value, None, None


def _gradients(
    of: tuple[Tensor, Tensor, Tensor], gradient: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value."""
    query, key, value = of
    rows, heads, length, width = query.shape
    grouped = (rows, key.shape[1], heads // key.shape[1] * length)
    query = query.reshape(*grouped, width) * scale
    gradient = gradient.reshape(*grouped, value.shape[-1])
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores.view(rows, key.shape[1], -1, *bias.shape[-2:]).add_(bias.unsqueeze(1))
    weights = scores.softmax(-1)
    by_weights = torch.matmul(gradient, value.transpose(-1, -2))
    by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
    return (
        torch.matmul(by_scores, key).mul_(scale).view(rows, heads, length, width),
        torch.matmul(by_scores.transpose(-1, -2), query),
        torch.matmul(weights.transpose(-1, -2), gradient),
    )


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float
) -> Tensor:
    """As `attend`, with the gradient by matrix products."""
    apply: Any = _Products.apply
    found: Tensor = apply(query, key, value, parts, scale)
    return found


def _layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    products: bool,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention layer in the form in which transformers calls it.

    Outside `in_parts` it is torch's kernel over the whole of a row.
    """
    parts = _parts.get()
    if parts is None or query.shape[2] != parts.bias.shape[-1]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    function = attend_by_products if products and torch.is_grad_enabled() else attend
    return function(query, key, value, parts, scale), None


def _by_fused(*arguments: Any, **named: Any) -> tuple[Tensor, None]:
    return _layer(*arguments, products=False, **named)


def _by_products(*arguments: Any, **named: Any) -> tuple[Tensor, None]:
    return _layer(*arguments, products=True, **named)


def _register() -> None:
    """Tells transformers the kernels' names; a batch that is not cut gets the masks of ``sdpa``."""
    for name, layer in (("fused", _by_fused), ("products", _by_products)):
        AttentionInterface.register(_PREFIX + name, layer)
        AttentionMaskInterface.register(_PREFIX + name, sdpa_mask)
