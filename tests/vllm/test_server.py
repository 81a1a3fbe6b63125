"""vLLM's own server as the frozen LM: it gives what transformers gives in this process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from lmcot.config import CacheSettings, OpenAIFrozen, PromptSettings, TransformersFrozen
from lmcot.data.render import encode
from lmcot.frozen.cached import CachedLM
from lmcot.frozen.needs import Needs
from lmcot.frozen.open import check_frozen_lm, open_frozen_lm
from lmcot.models.sources import load_tokenizer
from lmcot.records import Choice, Completion, Sampling, Score
from tests.integration.servers import vllm_serve
from tests.vllm.conftest import plain, plain_logprobs
from tests.vllm.test_frozen import CONTINUATIONS, PROMPTS

PLAIN = PromptSettings()
OFF = CacheSettings(enabled=False)


@pytest.fixture(scope="module")
def endpoint(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIFrozen]:
    with vllm_serve(tmp_path_factory.mktemp("vllm") / "serve.log", folder) as url:
        yield OpenAIFrozen(
            backend="openai", base_url=url, model="tiny", api="completions", cache=OFF
        )


@pytest.fixture(scope="module")
def reference(folder: str) -> CachedLM:
    settings = TransformersFrozen(backend="transformers", source=folder, dtype="float32", cache=OFF)
    return open_frozen_lm(settings, PLAIN)


def test_the_server_has_all_that_a_run_may_need(endpoint: OpenAIFrozen) -> None:
    needs = Needs(((PROMPTS[0], Sampling(8)),), choices=(PROMPTS[0],), scores=True)
    found = check_frozen_lm(endpoint, needs)
    assert found.lacks == {}


def test_greedy_answers_agree(endpoint: OpenAIFrozen, reference: CachedLM) -> None:
    """Save for a character that the last token only begins: the server leaves it out."""
    sampling = Sampling(16)
    pairs = zip(
        open_frozen_lm(endpoint, PLAIN).generate(PROMPTS, sampling),
        reference.generate(PROMPTS, sampling),
        strict=True,
    )
    for found, wanted in pairs:
        assert isinstance(found, Completion)
        assert isinstance(wanted, Completion)
        assert found.text.rstrip("\ufffd") == wanted.text.rstrip("\ufffd")
        assert (found.tokens_in, found.tokens_out) == (wanted.tokens_in, wanted.tokens_out)


def test_scores_agree_to_six_digits(endpoint: OpenAIFrozen, reference: CachedLM) -> None:
    pairs = zip(
        open_frozen_lm(endpoint, PLAIN).score(PROMPTS, CONTINUATIONS),
        reference.score(PROMPTS, CONTINUATIONS),
        strict=True,
    )
    for found, wanted in pairs:
        assert isinstance(found, Score)
        assert isinstance(wanted, Score)
        assert found.logprob == pytest.approx(wanted.logprob, rel=1e-5)
        assert found.tokens == wanted.tokens


def test_choices_are_read_from_the_likeliest_tokens(folder: str, endpoint: OpenAIFrozen) -> None:
    """Twenty alternatives are asked for and given; the options' shares of them are exact."""
    lm = open_frozen_lm(endpoint, PLAIN)
    tokenizer, model = load_tokenizer(folder), plain(folder, "float32")
    for prompt in PROMPTS:
        row = plain_logprobs(model, tuple(encode(prompt, tokenizer, "auto")))[-1]
        likely = row.topk(20)
        starts = [tokenizer.decode([token]).strip().lower() for token in likely.indices]
        first = next(start for start in starts if start.isalpha())
        second = next(start for start in starts if start.isalpha() and start[0] != first[0])
        options = [f"{first}{first}", f"{second}{second}"]
        mass = {
            option: sum(
                math.exp(logprob)
                for start, logprob in zip(starts, likely.values.tolist(), strict=True)
                if start and option.startswith(start)
            )
            for option in options
        }
        (found,) = lm.choose([prompt], options)
        assert isinstance(found, Choice)
        wanted = {option: share / sum(mass.values()) for option, share in mass.items()}
        assert found.probabilities == pytest.approx(wanted, rel=1e-4)
