"""Chooses the kernel of the learner's attention, by a trial on this machine that is remembered."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lmcot.config import Kernel
from lmcot.errors import UserError
from lmcot.files import cache_folder, read_object
from lmcot.learner.batching import TokenPair
from lmcot.models.attention import KERNELS, cut_up, in_parts, layer_of
from lmcot.models.sequences import Row, make_batch

TRIED_FROM = 10_000_000
"""Parameters of a model from which attention takes long enough for a trial."""
_STEP = 64
"""Lengths are rounded up to a multiple of this, so that steps of similar lengths share a trial."""
_TURNS = 3
_GAIN = 0.95
"""Share of the best time so far that another kernel must stay below to be preferred."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of one layer over a micro-batch."""

    rows: int
    prompt: int
    responses: int
    """Tokens of all responses of a row."""
    heads: int
    key_heads: int
    width: int
    dtype: str


def shape_of(lm: Any, pairs: Sequence[TokenPair], budget: int) -> Shape | None:
    """The shape for a step's longest row; None if no two of its responses share a prompt.

    Args:
        budget: tokens of a micro-batch.
    """
    responses: dict[tuple[int, ...], list[int]] = {}
    for ids, response in pairs:
        responses.setdefault(tuple(ids), []).append(len(response))
    rows = [(len(ids), sum(lengths)) for ids, lengths in responses.items() if lengths[1:]]
    if not rows:
        return None
    prompt, behind = (-(-length // _STEP) * _STEP for length in max(rows, key=sum))
    text = lm.config.get_text_config(decoder=True)
    heads = int(text.num_attention_heads)
    return Shape(
        rows=min(2, max(1, budget // (prompt + behind))),
        prompt=prompt,
        responses=behind,
        heads=heads,
        key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        width=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        dtype=str(lm.dtype).removeprefix("torch."),
    )


def fastest_kernel(shape: Shape) -> Kernel:
    """The kernel that is fastest on this machine, by a trial unless one is remembered.

    Of several processes that try at once, the first to finish decides for all. Where nothing can
    be remembered there is no trial, since two runs might then take different kernels.

    Raises:
        UserError: if what is remembered is damaged.
    """
    try:
        folder = cache_folder() / "attention"
    except UserError:
        return "model"
    asked = {"machine": _machine(), "shape": asdict(shape)}
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}.json"
    if not path.exists():
        seconds = _trial(shape)
        _write_once(path, {"kernel": _least(seconds), "seconds": seconds, **asked})
    remedy = "delete it, and the kernels are tried again"
    kernel = read_object(path, remedy).get("kernel")
    found = next((one for one in KERNELS if one == kernel), None)
    if found is None:
        raise UserError(f"the file '{path}' is damaged (it names no kernel): {remedy}")
    return found


def _machine() -> dict[str, Any]:
    """What the times depend on, besides the shape."""
    return {
        "torch": str(torch.__version__),
        "processor": dict(torch.cpu.get_capabilities()),
        "threads": torch.get_num_threads(),
    }


def _least(seconds: Mapping[Kernel, float]) -> Kernel:
    best: Kernel = "model"
    for kernel in KERNELS:
        if seconds[kernel] < _GAIN * seconds[best]:
            best = kernel
    return best


def _trial(shape: Shape) -> dict[Kernel, float]:
    """Seconds of a forward pass without a gradient, and of a forward and a backward pass: the
    least of some turns."""
    chosen = torch.Generator().manual_seed(0)
    row = Row([0] * shape.prompt, [[0] * (shape.responses // 2 + 1)] * 2)
    batch = make_batch([row] * shape.rows, pad_id=0, start_id=None)
    visible = batch.attention_mask()
    dtype: torch.dtype = getattr(torch, shape.dtype)
    layer = SimpleNamespace(
        num_key_value_groups=shape.heads // shape.key_heads, is_causal=True, training=True
    )

    def made_up(heads: int) -> Tensor:
        size = (shape.rows, visible.shape[-1], heads, shape.width)
        return torch.randn(size, generator=chosen).to(dtype).transpose(1, 2).requires_grad_()

    query, key, value = made_up(shape.heads), made_up(shape.key_heads), made_up(shape.key_heads)
    least = dict.fromkeys(KERNELS, float("inf"))
    with in_parts(cut_up(batch, visible, dtype)):
        for turn in range(_TURNS + 1):
            for kernel in KERNELS:
                began = time.perf_counter()
                for gradient in (False, True):
                    with torch.set_grad_enabled(gradient):
                        found, _ = layer_of(kernel)(
                            layer, query, key, value, visible, scaling=shape.width**-0.5
                        )
                torch.autograd.grad(found.sum(), (query, key, value))
                if turn:  # the first one makes kernels and takes memory
                    least[kernel] = min(least[kernel], time.perf_counter() - began)
    return least


def _write_once(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file whole; one that is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)
