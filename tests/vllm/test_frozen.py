"""The frozen LM on vLLM gives what the one on transformers gives."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcot.config import (
    CacheSettings,
    PromptSettings,
    TransformersFrozen,
    VllmFrozen,
)
from lmcot.errors import UserError
from lmcot.frozen.needs import Needs
from lmcot.frozen.open import check_frozen_lm, open_frozen_lm
from lmcot.frozen.vllm_backend import VllmLM
from lmcot.models.sources import count_parameters, load_model
from lmcot.records import Choice, Completion, Message, Prompt, Sampling, Score

PROMPTS: list[Prompt] = [
    (Message("system", "Answer the question."), Message("user", f"Who was born in {year}?\nA:"))
    for year in ("the city", "a river", "the first band", "no country")
]
OPTIONS = ["yes", "no"]
CONTINUATIONS = ["the band", "in the city of a river.", "x", "what?"]
PLAIN = PromptSettings()


@pytest.fixture(scope="module")
def lm(folder: str) -> Iterator[VllmLM]:
    settings = VllmFrozen(backend="vllm", source=folder, dtype="float32", cache_gib=0.1)
    found = VllmLM.open(settings, PLAIN)
    yield found
    found.close()


@pytest.fixture(scope="module")
def reference(folder: str) -> object:
    settings = TransformersFrozen(
        backend="transformers", source=folder, dtype="float32",
        cache=CacheSettings(enabled=False),
    )  # fmt: skip
    return open_frozen_lm(settings, PLAIN)


def test_greedy_replies_agree(lm: VllmLM, reference: VllmLM) -> None:
    """Text, counts and reasons, with stop strings and without."""
    for stop in ((), None, ("a", "in")):
        sampling = Sampling(24, stop=stop)
        found = lm.generate(PROMPTS, sampling)
        assert found == reference.generate(PROMPTS, sampling)
        assert all(isinstance(one, Completion) for one in found)


def test_choices_and_scores_agree_to_six_digits(lm: VllmLM, reference: VllmLM) -> None:
    pairs = zip(lm.choose(PROMPTS, OPTIONS), reference.choose(PROMPTS, OPTIONS), strict=True)
    for found, wanted in pairs:
        assert isinstance(found, Choice)
        assert isinstance(wanted, Choice)
        assert found.probabilities == pytest.approx(wanted.probabilities, rel=1e-5)
        assert (found.tokens_in, found.tokens_out) == (wanted.tokens_in, wanted.tokens_out)
    scores = zip(
        lm.score(PROMPTS, CONTINUATIONS), reference.score(PROMPTS, CONTINUATIONS), strict=True
    )
    for one, other in scores:
        assert isinstance(one, Score)
        assert isinstance(other, Score)
        assert one.logprob == pytest.approx(other.logprob, rel=1e-6)
        assert (one.tokens, one.tokens_in) == (other.tokens, other.tokens_in)


def test_calls_of_many_threads_are_answered_together(lm: VllmLM) -> None:
    alone = [lm.generate([prompt], Sampling(16)) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: lm.generate([prompt], Sampling(16)), PROMPTS))
    assert together == alone


def test_seeded_replies_repeat_and_others_do_not(lm: VllmLM) -> None:
    seeded = Sampling(16, temperature=1.0, seed=3)
    assert lm.repeats(seeded)
    assert lm.generate(PROMPTS, seeded) == lm.generate(PROMPTS, seeded)
    free = Sampling(16, temperature=1.0)
    assert not lm.repeats(free)
    assert lm.generate(PROMPTS, free) != lm.generate(PROMPTS, free)


def test_the_model_is_named_by_its_content(lm: VllmLM, folder: str) -> None:
    assert lm.identity.startswith(f"vllm:{folder}:float32 on cpu:")
    assert lm.parameters == count_parameters(load_model(folder, "float32")[0])


def test_an_encoder_decoder_is_refused_by_name() -> None:
    settings = VllmFrozen(backend="vllm", source="random:t5")
    said = r"frozen.backend is 'vllm', but frozen.source 'random:t5' is an encoder-decoder"
    with pytest.raises(UserError, match=said):
        check_frozen_lm(settings, Needs(()))


def test_a_window_beyond_the_cache_is_the_users_to_settle(tmp_path: Path, folder: str) -> None:
    settings = VllmFrozen(backend="vllm", source=folder, cache_gib=0.0001)
    with pytest.raises(UserError, match=r"cache_gib 0.0001 and a window of 512 tokens: To serve"):
        VllmLM.open(settings, PLAIN)
