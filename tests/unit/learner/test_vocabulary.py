"""Log-probabilities and entropies in chunks, against torch over the whole tensor."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from lmcot.learner import vocabulary
from lmcot.learner.vocabulary import token_entropy, token_logprobs

TOKENS, VOCABULARY = 7, 11


def _whole_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    scores = logits.float() / temperature
    return scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scores.logsumexp(-1)


def _whole_entropy(logits: Tensor, temperature: float) -> Tensor:
    logs = (logits.float() / temperature).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _made_up(dtype: torch.dtype, shape: tuple[int, ...] = (TOKENS,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, VOCABULARY, generator=generator)).to(dtype)
    return logits.requires_grad_(), torch.randint(VOCABULARY, shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 2 * VOCABULARY, 3 * VOCABULARY + 1, 2**20])
def test_logprobs_and_their_gradient_are_the_whole_tensors_to_the_bit(
    dtype: torch.dtype, temperature: float, chunk: int
) -> None:
    """[2] however the tokens are cut into chunks, the last one smaller or not."""
    logits, ids = _made_up(dtype)
    weights = torch.linspace(-1, 2, TOKENS)
    with mock.patch.object(vocabulary, "_CHUNK", chunk):
        found = token_logprobs(logits, ids, temperature)
        (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    expected = _whole_logprobs(logits, ids, temperature)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert found.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 2**20])
def test_entropies_and_their_gradient_are_the_whole_tensors(temperature: float, chunk: int) -> None:
    """[23] the values to the bit; the gradient by another formula."""
    logits, _ = _made_up(torch.float32)
    weights = torch.linspace(-1, 2, TOKENS)
    with mock.patch.object(vocabulary, "_CHUNK", chunk):
        found = token_entropy(logits, temperature)
        (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    expected = _whole_entropy(logits, temperature)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


def test_any_number_of_dimensions_will_do() -> None:
    logits, ids = _made_up(torch.float32, (2, 3))
    assert torch.equal(token_logprobs(logits, ids), _whole_logprobs(logits, ids, 1.0))
    assert torch.equal(token_entropy(logits), _whole_entropy(logits, 1.0))


def test_no_chunk_is_larger_than_it_may_be() -> None:
    logits = torch.zeros(1000, 2**14)
    sizes = [len(logits[chunk]) for chunk in vocabulary._chunks(logits)]
    assert sum(sizes) == 1000
    assert max(sizes) * 2**14 == vocabulary._CHUNK
    wide = torch.zeros(2, 1).expand(2, 2**23)
    assert [len(wide[chunk]) for chunk in vocabulary._chunks(wide)] == [1, 1]
