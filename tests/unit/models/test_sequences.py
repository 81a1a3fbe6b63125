"""Rows of a prompt and its responses as tensors, for both architectures."""

from __future__ import annotations

from itertools import compress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcot.models.sequences import Row, make_batch

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [Row([5, 6, 7], [[10, 11, 12], [20, 1]]), Row([8], [[30]])]


def _mask(text: str) -> list[list[bool]]:
    """A mask drawn with ``x`` for what is seen, one line for each query."""
    return [[letter == "x" for letter in line] for line in text.split()]


def test_layout_of_a_decoder_only_row() -> None:
    """[1] every token is predicted one column earlier; a response's last token is not read."""
    batch = make_batch(ROWS, pad_id=0, start_id=None)
    assert batch.ids.tolist() == [[5, 6, 7, 10, 11, 20], [8, 0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, -1, -1, -1, -1, -1]]
    # The second response begins behind the prompt too.
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3], [0, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [10, 11, 12, 20, 1, 30]
    # Column 2 is the prompt's last: it predicts the first token of both responses.
    assert batch.where.tolist() == [[0, 0, 0, 0, 0, 1], [2, 3, 4, 2, 5, 0]]
    assert batch.encoder_ids is None
    assert batch.encoder_mask is None
    assert batch.shared
    assert batch.attention_mask().shape == (2, 1, 6, 6)
    assert batch.attention_mask()[0, 0].tolist() == _mask("""
        x.....
        xx....
        xxx...
        xxxx..
        xxxxx.
        xxx..x""")
    assert batch.attention_mask()[1, 0].tolist() == _mask("""
        x.....
        xx....
        x.x...
        x..x..
        x...x.
        x....x""")


def test_layout_of_an_encoder_decoder_row() -> None:
    """[5] the encoder's input is padded on the right, with its mask; the start token, which is
    the pad token, is read and seen."""
    batch = make_batch(ROWS, pad_id=0, start_id=0)
    assert batch.encoder_ids is not None
    assert batch.encoder_mask is not None
    assert batch.encoder_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.encoder_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.ids.tolist() == [[0, 10, 11, 0, 20], [0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2], [1, -1, -1, -1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [10, 11, 12, 20, 1, 30]
    assert batch.where.tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 0]]
    assert batch.attention_mask()[0, 0].tolist() == _mask("""
        x....
        xx...
        xxx..
        ...x.
        ...xx""")
    assert batch.attention_mask()[1, 0].tolist() == _mask("""
        x....
        .x...
        ..x..
        ...x.
        ....x""")


def test_one_response_in_each_row_is_not_shared() -> None:
    for start_id in (None, 0):
        batch = make_batch(
            [Row([5], [[9, 1]]), Row([6, 7], [[8, 9, 1]])], pad_id=0, start_id=start_id
        )
        assert not batch.shared


def test_pad_that_is_also_eos_is_read_where_it_is_eos() -> None:
    """[4] pad == EOS: what is padding is known by its place, not by its id."""
    batch = make_batch([Row([1, 5], [[1], [6, 1, 1]]), Row([5], [[7, 1]])], pad_id=1, start_id=None)
    assert batch.ids.tolist() == [[1, 5, 6, 1], [5, 7, 1, 1]]
    assert batch.segments.tolist() == [[0, 0, 2, 2], [0, 1, -1, -1]]
    assert batch.targets.tolist() == [1, 6, 1, 1, 7, 1]
    assert batch.where.tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 2, 3, 0, 1]]


@pytest.mark.parametrize("start_id", [None, 0])
def test_what_is_empty_is_refused(start_id: int | None) -> None:
    """[16] an empty response never enters a batch; behind an empty prompt, the first token's
    logits would be read from the row's last column."""
    with pytest.raises(ValueError, match="a response is empty"):
        make_batch([Row([5], [[9]]), Row([5], [[9], []])], pad_id=0, start_id=start_id)
    with pytest.raises(ValueError, match="a prompt is empty"):
        make_batch([Row([5], [[9]]), Row([], [[9]])], pad_id=0, start_id=start_id)


TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
RANDOM_ROWS = st.lists(
    st.builds(Row, TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4
)


@given(RANDOM_ROWS, st.sampled_from([None, 0, 3]))
def test_every_token_is_predicted_from_exactly_what_comes_before_it(
    rows: list[Row], start_id: int | None
) -> None:
    """[1] where a token is predicted, its prompt and its own response's earlier tokens are seen,
    at the positions that they would have alone, and nothing else."""
    batch = make_batch(rows, pad_id=3, start_id=start_id)
    expected = [
        (number, list(row.prompt), list(response[:t]), token)
        for number, row in enumerate(rows)
        for response in row.responses
        for t, token in enumerate(response)
    ]
    assert batch.targets.dtype == batch.ids.dtype == torch.int64
    assert batch.targets.tolist() == [token for *_, token in expected]
    masks = batch.attention_mask()[:, 0].tolist()
    ids, positions = batch.ids.tolist(), batch.positions.tolist()
    for (number, prompt, before, _), row, column in zip(
        expected, *batch.where.tolist(), strict=True
    ):
        assert row == number
        context = [*prompt, *before] if start_id is None else [start_id, *before]
        seen = masks[row][column]
        assert list(compress(ids[row], seen)) == context
        assert list(compress(positions[row], seen)) == list(range(len(context)))
    assert (batch.encoder_ids is None) == (start_id is None)
    if batch.encoder_ids is not None and batch.encoder_mask is not None:
        for row, (encoded, mask) in enumerate(
            zip(batch.encoder_ids.tolist(), batch.encoder_mask.tolist(), strict=True)
        ):
            assert list(compress(encoded, mask)) == list(rows[row].prompt)


@given(RANDOM_ROWS, st.sampled_from([None, 0]))
def test_padding_is_seen_by_itself_alone(rows: list[Row], start_id: int | None) -> None:
    """[6] no token sees padding, and every place sees itself."""
    batch = make_batch(rows, pad_id=3, start_id=start_id)
    mask = batch.attention_mask()[:, 0]
    assert bool(mask.diagonal(dim1=1, dim2=2).all())
    itself = torch.eye(mask.shape[1], dtype=torch.bool)
    to_padding = mask & (batch.segments < 0).unsqueeze(1)
    assert not bool((to_padding & ~itself).any())
    read = (batch.segments >= 0).sum(-1).tolist()
    starts = 0 if start_id is None else 1
    for row, number in zip(rows, read, strict=True):
        prompt = len(row.prompt) if start_id is None else 0
        assert number == prompt + sum(len(r) - 1 + starts for r in row.responses)
    assert batch.ids[batch.segments < 0].eq(3).all()
