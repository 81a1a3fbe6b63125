"""The learner's tensors: each row holds a prompt and one or more of its responses.

The responses of a row lie end to end and do not see each other, so that their shared prompt goes
through the model once. A decoder-only model reads ``prompt r1 r2 ...``; in an encoder-decoder the
encoder reads the prompt and the decoder ``start r1 start r2 ...``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmcot.models.batches import pad_right


class Row(NamedTuple):
    """One prompt and some of its responses, as token ids."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Rows as padded tensors, int64 on the CPU.

    The last token of a response is predicted but not read, since nothing follows it.
    """

    ids: Tensor
    """[rows, length] what the decoder reads"""
    segments: Tensor
    """[rows, length] 0 for a prompt's tokens, 1, 2, ... for its responses', -1 for padding"""
    positions: Tensor
    """[rows, length] a token's distance from the start of its prompt (of its response, if the
    prompt is read by an encoder)"""
    encoder_ids: Tensor | None
    """[rows, prompt] what an encoder-decoder's encoder reads"""
    encoder_mask: Tensor | None
    """[rows, prompt]"""
    targets: Tensor
    """[tokens] all response tokens, row by row, response by response"""
    where: Tensor
    """[2, tokens] the row and the column at which each one is predicted"""

    @property
    def shared(self) -> bool:
        """Whether any row holds more than one response."""
        return bool(self.segments.max() > 1)

    def attention_mask(self) -> Tensor:
        """The mask that lets a token see its prompt and its own response, up to itself.

        Padding sees itself, since softmax is undefined over no keys.

        Returns:
            bool [rows, 1, length, length], queries before keys.
        """
        length = self.ids.shape[1]
        query, key = self.segments.unsqueeze(2), self.segments.unsqueeze(1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = causal & ((key == query) | (key == 0)) & (key >= 0)
        return (seen | torch.eye(length, dtype=torch.bool)).unsqueeze(1)


def make_batch(rows: Sequence[Row], *, pad_id: int, start_id: int | None) -> SequenceBatch:
    """Pads rows for one forward pass.

    Args:
        start_id: the decoder's start token; None for a decoder-only model.

    Raises:
        ValueError: if a response is empty, so that nothing can be learned from it, or a prompt
            is, so that no token predicts the first one of the response.
    """
    if any(not response for row in rows for response in row.responses):
        raise ValueError("a response is empty")
    if any(not row.prompt for row in rows):
        raise ValueError("a prompt is empty")
    laid = [_lay_out(row, start_id) for row in rows]
    ids, mask = pad_right([one.ids for one in laid], pad_id)
    segments, _ = pad_right([one.segments for one in laid], 0)
    encoder: tuple[Tensor, Tensor] | None = None
    if start_id is not None:
        encoder = pad_right([row.prompt for row in rows], pad_id)
    return SequenceBatch(
        ids=ids,
        segments=segments.where(mask.bool(), torch.tensor(-1)),
        positions=pad_right([one.positions for one in laid], 0)[0],
        encoder_ids=encoder[0] if encoder else None,
        encoder_mask=encoder[1] if encoder else None,
        targets=torch.tensor([t for row in rows for r in row.responses for t in r]),
        where=torch.tensor(
            [
                [number for number, one in enumerate(laid) for _ in one.columns],
                [column for one in laid for column in one.columns],
            ]
        ),
    )


class _Layout(NamedTuple):
    ids: list[int]
    segments: list[int]
    positions: list[int]
    columns: list[int]


def _lay_out(row: Row, start_id: int | None) -> _Layout:
    prompt = list(row.prompt) if start_id is None else []
    layout = _Layout([*prompt], [0] * len(prompt), [*range(len(prompt))], [])
    for segment, response in enumerate(row.responses, start=1):
        begin = len(layout.ids)
        read = [*([] if start_id is None else [start_id]), *response[:-1]]
        layout.ids.extend(read)
        layout.segments.extend([segment] * len(read))
        layout.positions.extend(range(len(prompt), len(prompt) + len(read)))
        # The last token of the prompt, or the start token, predicts the first one.
        layout.columns.extend([len(prompt) - 1] if start_id is None else [])
        layout.columns.extend(range(begin, begin + len(read)))
    return layout
