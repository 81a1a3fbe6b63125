"""The sampler: its log-probabilities are the learner's, its draws the model's and nobody else's."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmcot.config import parse_config
from lmcot.data.sampler import sample_seed
from lmcot.errors import UserError
from lmcot.learner.vocabulary import token_logprobs
from lmcot.models.batches import pad_left, pad_right
from lmcot.models.generation import engine as engine_module
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import (
    FailureEvent,
    Generated,
    SampleEvent,
    SampleRequest,
)
from lmcot.models.generation.sampling import pick
from lmcot.models.generation.takeover import refusal
from lmcot.models.generation.tree import SHORTEST_SHARED
from lmcot.models.generation.tree_decoder import TreeDecoder
from lmcot.models.policy import Policy, response_logits
from lmcot.models.sequences import Row, SequenceBatch, make_batch
from lmcot.models.sources import eos_ids, load_model, resolve_source
from lmcot.records import Failure
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("kind", ["llama", "t5"])
TEXTS = [
    "Which city was the country born in?",
    "The film.",
    "Question: who was the band of the album, and what year was it first?",
    "answer by step",
]


def _prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in TEXTS]


LONG = "the first film of the band was in the city of the country and the year was the born and by "
"""Repeated three times it is long enough for prompts that begin with it to share it."""


def _samples(
    loaded: tuple[Any, Any],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    **changes: Any,
) -> list[list[Generated]]:
    """Several samples of each prompt, from an engine of their own."""
    model, tokenizer = loaded
    settings = {"max_new_tokens": 12, "eos_ids": eos_ids(model, tokenizer), **changes}
    requests = [
        SampleRequest(prompt, own, **settings) for prompt, own in zip(prompts, seeds, strict=True)
    ]
    found: list[list[Generated]] = []
    for one in GenerationEngine(model, pad_id=tokenizer.pad_token_id).sample(requests):
        assert not isinstance(one, Failure)
        found.append(one)
    return found


def _sample(
    loaded: tuple[Any, Any],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
    **changes: Any,
) -> list[Generated]:
    """One sample of each prompt, each a request of its own."""
    seeds = seeds or [sample_seed(0, row) for row in range(len(prompts))]
    return [one for (one,) in _samples(loaded, prompts, [[seed] for seed in seeds], **changes)]


@pytest.fixture(params=["tree", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the engine: over the tree of prompts, and batch by batch."""

    def answer(decoder: TreeDecoder) -> str | None:
        if request.param == "plain":
            return "a test says so"
        assert refusal(decoder) is None, "these models' attention can be taken over"
        return None

    monkeypatch.setattr(engine_module, "refusal", answer)
    return str(request.param)


@torch.no_grad()
def _scored(
    loaded: tuple[Any, Any],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> Tensor:
    """The learner's log-probabilities, 0 at padding."""
    model, tokenizer = loaded
    batch = _batch(model, prompts, responses, tokenizer.pad_token_id)
    return _scored_batch(model, batch, [len(response) for response in responses], temperature)


def _batch(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> SequenceBatch:
    rows = [Row(prompt, [response]) for prompt, response in zip(prompts, responses, strict=True)]
    return make_batch(rows, pad_id=pad_id, start_id=Policy(model).start_id)


@torch.no_grad()
def _scored_batch(
    model: Any, batch: SequenceBatch, lengths: Sequence[int], temperature: float = 1.0
) -> Tensor:
    logits, _ = response_logits(model, batch)
    flat = token_logprobs(logits, batch.targets, temperature)
    return torch.nn.utils.rnn.pad_sequence(flat.split(list(lengths)), batch_first=True)


@torch.no_grad()
def _hand_loop(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> list[float]:
    """One forward pass for each token, nothing padded, nothing cached."""
    result = []
    for t, token in enumerate(response):
        before = list(response[:t])
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            logits = model(
                input_ids=torch.tensor([prompt]),
                decoder_input_ids=torch.tensor([[start, *before]]),
            ).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *before]])).logits
        result.append(float(torch.log_softmax(logits[0, -1] / temperature, -1)[token]))
    return result


@BOTH
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_learner_and_hand_loop_agree(
    tiny: TinyModel, kind: str, temperature: float
) -> None:
    """[1] [2] the sampler's log-probs equal the learner's re-scored ones and a hand loop's."""
    loaded = tiny(kind)
    prompts = _prompts(loaded[1])
    generated = _sample(loaded, prompts, temperature=temperature)
    responses = [one.response_ids for one in generated]
    scored = _scored(loaded, prompts, responses, temperature)
    for row, one in enumerate(generated):
        ours = torch.tensor(one.logprobs)
        assert len(one.logprobs) == len(one.response_ids)
        by_hand = torch.tensor(_hand_loop(loaded[0], prompts[row], one.response_ids, temperature))
        torch.testing.assert_close(ours, scored[row, : len(ours)], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=0)
    other = _scored(loaded, prompts, responses, 1.3)
    assert float((other - scored).abs().max()) > 0.01, "the temperature must make a difference"


@BOTH
@pytest.mark.usefixtures("path")
def test_shared_prompts_give_each_sample_its_own_logprobs(tiny: TinyModel, kind: str) -> None:
    """[1] [2] K samples of a prompt, and prompts that begin alike, are scored as if alone."""
    loaded = tiny(kind)
    prompts = [loaded[1](LONG * 3 + text).input_ids for text in TEXTS]
    assert len({tuple(prompt[:SHORTEST_SHARED]) for prompt in prompts}) == 1
    seeds = [[sample_seed(row, k) for k in range(3)] for row in range(len(prompts))]
    for prompt, group in zip(prompts, _samples(loaded, prompts, seeds), strict=True):
        assert len({one.response_ids for one in group}) == 3
        responses = [one.response_ids for one in group]
        scored = _scored(loaded, [prompt] * 3, responses)
        for row, one in enumerate(group):
            ours = torch.tensor(one.logprobs)
            torch.testing.assert_close(ours, scored[row, : len(ours)], atol=1e-4, rtol=0)


@BOTH
@pytest.mark.usefixtures("path")
def test_bfloat16_logprobs_are_close_to_the_learners(tiny: TinyModel, kind: str) -> None:
    """[1] drawn or greedy, they are within 0.15 of the learner's in the same arithmetic."""
    model, tokenizer = tiny(kind)
    loaded = copy.deepcopy(model).to(torch.bfloat16), tokenizer
    prompts = _prompts(tokenizer)
    for temperature in (1.0, 0.0):
        generated = _sample(loaded, prompts, temperature=temperature)
        scored = _scored(loaded, prompts, [one.response_ids for one in generated])
        for row, one in enumerate(generated):
            ours = torch.tensor(one.logprobs)
            torch.testing.assert_close(ours, scored[row, : len(ours)], atol=0.15, rtol=0)


def _with_generation_config(source: str, folder: Path, **values: Any) -> str:
    shutil.copytree(resolve_source(source), folder)
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


@BOTH
def test_the_models_own_generation_config_changes_nothing(
    tiny: TinyModel, tmp_path: Path, kind: str
) -> None:
    """[3] top-k and repetition penalty in generation_config.json do not reach the sampler."""
    source = _with_generation_config(
        f"random:{kind}",
        tmp_path / "model",
        top_k=1,
        do_sample=True,
        repetition_penalty=5.0,
        temperature=0.1,
        eos_token_id=[1, 7],
    )
    model, tokenizer = loaded = load_model(source, "float32")
    assert model.generation_config.top_k != 1
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert eos_ids(model, tokenizer) == {1, 7}, "its own EOS tokens are kept"
    prompts = _prompts(tokenizer)[:1] * 8
    generated = _sample(loaded, prompts)
    assert len({one.response_ids[0] for one in generated}) > 1
    scored = _scored(tiny(kind), prompts, [one.response_ids for one in generated])
    for row, one in enumerate(generated):
        ratio = (scored[row, : len(one.logprobs)] - torch.tensor(one.logprobs)).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", ["top_k", "top_p", "repetition_penalty"])
def test_the_config_refuses_truncated_sampling(key: str) -> None:
    """[3] no top-k, top-p or repetition penalty in training rollouts: the config refuses them."""
    with pytest.raises(UserError, match=key):
        parse_config(
            {
                "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
                "policy": {"source": "random:counting-llama", key: 1},
                "rewards": {"kind": "increasing"},
                "refine": {"start_from": "base"},
            }
        )


def test_pad_that_is_also_eos(tmp_path: Path) -> None:
    """[4] pad == EOS: the first EOS stays in the response and in the mask, the rest is out."""
    folder = tmp_path / "model"
    shutil.copytree(resolve_source("random:llama"), folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["pad_token"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    model, tokenizer = loaded = load_model(str(folder), "float32")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos

    # Many tokens end the response, so that the rows end at different places.
    prompts = _prompts(tokenizer)
    ends = frozenset(range(eos, 120))
    generated = _sample(loaded, prompts * 4, eos_ids=ends, max_new_tokens=6)
    for one in generated:
        inside = [token in ends for token in one.response_ids]
        assert inside == [False] * (len(inside) - 1) + [one.finish_reason == "eos"]
    assert len({len(one.response_ids) for one in generated}) > 2

    responses = [[5, 6, eos], [9, eos], [8, 9, 10, 11]]
    batch = _batch(model, prompts[:3], responses, eos)
    assert batch.targets.tolist() == [5, 6, eos, 9, eos, 8, 9, 10, 11]
    together = _scored_batch(model, batch, [3, 2, 4])
    for row, response in enumerate(responses):
        alone = torch.tensor(_hand_loop(model, prompts[row], response, 1.0))
        torch.testing.assert_close(together[row, : len(response)], alone, atol=1e-5, rtol=0)


@BOTH
def test_padding_does_not_change_logprobs(tiny: TinyModel, kind: str) -> None:
    """[5] log-probs stay when the batch is padded further, and from batch 1 to a row of 4."""
    loaded = tiny(kind)
    prompts = _prompts(loaded[1])
    responses = [[30, 40, 1], [50], [60, 70, 80, 90, 100, 1], [3, 1]]
    together = _scored(loaded, prompts, responses)
    for row in range(4):
        alone = _scored(loaded, prompts[row : row + 1], responses[row : row + 1])
        torch.testing.assert_close(
            alone[0], together[row, : len(responses[row])], atol=1e-5, rtol=0
        )

    # A longer prompt and a longer response in a fifth row pad the other four further.
    further = _scored(loaded, [*prompts, prompts[2] * 3], [*responses, [44] * 20])
    torch.testing.assert_close(further[:4, : together.shape[1]], together, atol=1e-5, rtol=0)
    assert float(further[:4, together.shape[1] :].abs().max()) == 0


def test_t5_begins_with_the_decoder_start_token(tiny: TinyModel) -> None:
    """[5] the decoder's inputs are the start token (pad) and the response shifted by one: its last
    token is not read, for nothing follows it."""
    model, tokenizer = loaded = tiny("t5")
    # An engine tries its model out first: that is not to be seen here.
    engine = GenerationEngine(model, pad_id=tokenizer.pad_token_id)
    seen: list[Any] = []

    def spy(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"].tolist())

    handle = model.decoder.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        _scored(loaded, [[5, 1], [6, 7, 1]], [[30, 40, 1], [50, 1]])
        start, pad = model.config.decoder_start_token_id, tokenizer.pad_token_id
        assert start == pad
        assert seen == [[[start, 30, 40], [start, 50, pad]]]
        seen.clear()
        found = engine.sample([SampleRequest([5, 1], [7], max_new_tokens=3)])[0]
        assert not isinstance(found, Failure)
        first, second, _ = found[0].response_ids
        # The first of them makes the keys and values of what the encoder read, and no more.
        assert seen == [[[start]], [[start]], [[first]], [[second]]]
    finally:
        handle.remove()


@BOTH
@pytest.mark.usefixtures("path")
def test_greedy_equals_generate(tiny: TinyModel, kind: str) -> None:
    """Greedy decoding is transformers' `generate(do_sample=False)`, padded prompts and all."""
    model, tokenizer = loaded = tiny(kind)
    prompts = _prompts(tokenizer)
    # One EOS that greedy decoding does reach, so that rows end at different places.
    free = _sample(loaded, prompts, temperature=0.0, eos_ids=frozenset())
    ends = frozenset({free[0].response_ids[3]})
    ours = _sample(loaded, prompts, temperature=0.0, eos_ids=ends)
    ids, mask = (pad_right if kind == "t5" else pad_left)(prompts, tokenizer.pad_token_id)
    theirs = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    new = theirs[:, 1:] if kind == "t5" else theirs[:, ids.shape[1] :]
    assert ours[0].finish_reason == "eos"
    assert ours[0].response_ids == free[0].response_ids[: len(ours[0].response_ids)]
    for row, one in enumerate(ours):
        length = len(one.response_ids)
        assert new[row, :length].tolist() == list(one.response_ids)
        assert set(new[row, length:].tolist()) <= {tokenizer.pad_token_id}
        by_hand = torch.tensor(_hand_loop(model, prompts[row], one.response_ids, 1.0))
        torch.testing.assert_close(torch.tensor(one.logprobs), by_hand, atol=1e-5, rtol=0)


@BOTH
@pytest.mark.usefixtures("path")
def test_a_sample_does_not_depend_on_who_shares_its_batch(tiny: TinyModel, kind: str) -> None:
    """Nor on who stands behind the same prompt, or in which order."""
    loaded = tiny(kind)
    prompts = _prompts(loaded[1])
    seeds = [sample_seed(7, row) for row in range(4)]
    together = _sample(loaded, prompts, seeds=seeds)
    turned = _sample(loaded, prompts[::-1], seeds=seeds[::-1])[::-1]
    longer = _sample(loaded, prompts, seeds=seeds, max_new_tokens=16)
    for row, one in enumerate(together):
        alone = _sample(loaded, prompts[row : row + 1], seeds=seeds[row : row + 1])[0]
        assert alone.response_ids == turned[row].response_ids == one.response_ids
        assert longer[row].response_ids[: len(one.response_ids)] == one.response_ids
        assert _samples(loaded, prompts[row : row + 1], [[3, seeds[row], 4]])[0][
            1
        ].response_ids == (one.response_ids)
    other = _sample(loaded, prompts, seeds=[sample_seed(8, row) for row in range(4)])
    assert [one.response_ids for one in other] != [one.response_ids for one in together]


@BOTH
@pytest.mark.usefixtures("path")
def test_the_same_requests_give_the_same_bits(tiny: TinyModel, kind: str) -> None:
    """Of one engine, after others in between, and of a new one."""
    model, tokenizer = loaded = tiny(kind)
    prompts = [tokenizer(LONG * 3 + text).input_ids for text in TEXTS]
    seeds = [[sample_seed(row, k) for k in range(3)] for row in range(len(prompts))]
    ends = eos_ids(model, tokenizer)
    requests = [
        SampleRequest(prompt, own, max_new_tokens=12, eos_ids=ends)
        for prompt, own in zip(prompts, seeds, strict=True)
    ]
    engine = GenerationEngine(model, pad_id=tokenizer.pad_token_id)
    first = engine.sample(requests)
    engine.sample([SampleRequest(prompts[1] + [9, 8], [5], max_new_tokens=7)])
    assert engine.sample(requests) == first == _samples(loaded, prompts, seeds)


@BOTH
def test_the_budget_of_tokens_changes_no_sample(tiny: TinyModel, kind: str) -> None:
    """[5] prompts that take several passes, between tokens of others, get what they get alone."""
    model, tokenizer = loaded = tiny(kind)
    prompts = [tokenizer(LONG * n + text).input_ids for n, text in enumerate([*TEXTS, *TEXTS])]
    assert max(len(prompt) for prompt in prompts) > 128, "two passes at least"
    requests = [SampleRequest(prompt, [row], 12) for row, prompt in enumerate(prompts)]
    narrow = GenerationEngine(model, pad_id=tokenizer.pad_token_id, max_batch_tokens=1)
    wide = _sample(loaded, prompts, range(len(prompts)), eos_ids=frozenset())
    for one, found in zip(wide, narrow.sample(requests), strict=True):
        assert not isinstance(found, Failure)
        assert found[0].response_ids == one.response_ids
        assert found[0].logprobs == pytest.approx(one.logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_models_distribution(tiny: TinyModel, temperature: float) -> None:
    """Chi-square of 4,000 first tokens against the model's softmax."""
    model, tokenizer = loaded = tiny("counting-llama")
    prompt = tokenizer("write increasing numbers from 3").input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    probabilities = (logits.double() / temperature).softmax(-1)
    draws = 4000
    seeds = [sample_seed(0, "chi-square", k) for k in range(draws)]
    generated = _samples(loaded, [prompt], [seeds], max_new_tokens=1, temperature=temperature)[0]
    counts = torch.bincount(
        torch.tensor([one.response_ids[0] for one in generated]), minlength=len(probabilities)
    )
    expected = probabilities * draws
    assert float(expected.min()) > 5, "else the chi-square distribution is no approximation"
    statistic = float(((counts - expected).square() / expected).sum())
    assert len(probabilities) == 18
    assert statistic < 40.79, "the 99.9% point at 17 degrees of freedom"


@pytest.mark.usefixtures("path")
def test_stop_and_length_end_a_sequence(tiny: TinyModel) -> None:
    """[7] what was cut at the limit, or stopped, is told apart from what ended by itself."""
    loaded = tiny("counting-llama")
    prompts = [loaded[1]("write numbers from 1").input_ids] * 64
    cut = _sample(loaded, prompts, max_new_tokens=5)
    assert {one.finish_reason for one in cut} == {"eos", "length"}
    for one in cut:
        ended = one.response_ids[-1] == loaded[1].eos_token_id
        assert one.finish_reason == ("eos" if ended else "length")
        assert ended or len(one.response_ids) == 5
    stopped = _sample(loaded, prompts, eos_ids=frozenset(), stop=lambda ids: len(ids) == 2)
    assert {(one.finish_reason, len(one.response_ids)) for one in stopped} == {("stop", 2)}
    assert _sample(loaded, []) == []


def test_sample_seed_is_a_stable_function_of_its_parts() -> None:
    """The first 63 bits of a SHA-256: the same on every machine and in every process."""
    assert sample_seed(0, 3, "question", 1) == SEED
    assert sample_seed(0, 3, "question", 2) != SEED
    assert 0 <= sample_seed("x") < 2**63


SEED = 0x16C86EB090F5BC54 >> 1
"""``printf 0/3/question/1 | sha256sum``, the first 16 digits halved."""


@BOTH
def test_ids_whose_text_tokenises_differently_are_kept(tiny: TinyModel, kind: str) -> None:
    """[32] token in, token out: a batch holds the ids, also where the text gives others."""
    model, tokenizer = tiny(kind)
    ids = tokenizer("the country", add_special_tokens=False).input_ids
    letters = [tokenizer.convert_tokens_to_ids(c) for c in ["t", "h", "e", "Ġ", *"country"]]
    assert tokenizer.decode(letters) == tokenizer.decode(ids) == "the country"
    assert tokenizer(tokenizer.decode(letters), add_special_tokens=False).input_ids != letters
    batch = _batch(model, [[5], [6]], [letters, ids], 0)
    assert batch.targets.tolist() == [*letters, *ids]


def _poisoned(loaded: tuple[Any, Any], token: int) -> tuple[Any, Any]:
    """A copy of a model in which nothing is finite behind one token."""
    model = copy.deepcopy(loaded[0])
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    return model, loaded[1]


@pytest.mark.parametrize("vocabulary", [18, 256, 392])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_without_a_distribution_are_told_apart(vocabulary: int, bad: float) -> None:
    """Whatever the size of the vocabulary; the other rows draw as they do without them."""
    torch.manual_seed(0)
    logits, uniform = torch.randn(3, vocabulary), torch.tensor([0.97, 0.5, 0.999]).double()
    expected = pick(logits, torch.ones(3), uniform)
    assert expected[2].tolist() == [True] * 3
    logits[1, 3] = bad
    tokens, logprobs, valid = pick(logits, torch.ones(3), uniform)
    assert valid.tolist() == [True, False, True]
    assert torch.equal(tokens[valid], expected[0][valid])
    assert torch.equal(logprobs[valid], expected[1][valid])


@BOTH
@pytest.mark.usefixtures("path")
def test_a_request_without_a_distribution_fails_alone(tiny: TinyModel, kind: str) -> None:
    loaded = tiny(kind)
    prompts = _prompts(loaded[1])
    expected = _sample(loaded, prompts)
    used = {token for one in expected for token in one.response_ids}
    bad = next(token for token in range(3, 300) if token not in used.union(*prompts))
    model, tokenizer = _poisoned(loaded, bad)
    ends = eos_ids(model, tokenizer)
    requests = [
        SampleRequest(prompt, [sample_seed(0, row)], 12, eos_ids=ends)
        for row, prompt in enumerate(prompts)
    ]
    requests.insert(1, SampleRequest([*prompts[0], bad], [1, 2], 12, eos_ids=ends))
    found = GenerationEngine(model, pad_id=tokenizer.pad_token_id).sample(requests)
    failure = found.pop(1)
    assert isinstance(failure, Failure)
    assert "not finite" in failure.reason
    for one, samples in zip(expected, found, strict=True):
        assert not isinstance(samples, Failure)
        assert samples[0].response_ids == one.response_ids


def test_what_failed_leaves_nothing_behind(tiny: TinyModel) -> None:
    """Two samples cease to be finite at their fourth token: what takes their place is sound."""
    loaded = tiny("llama")
    running, failing = SampleRequest([5, 6, 7], [1], 12), SampleRequest([10, 8], [3, 3], 12)
    later = SampleRequest([11, 9], [4, 5], 6)
    before = GenerationEngine(loaded[0], pad_id=0)
    bad = _samples(loaded, [[10, 8]], [[3]], eos_ids=frozenset())[0][0].response_ids[2]
    expected = [before.sample([one])[0] for one in (running, later)]
    engine = GenerationEngine(_poisoned(loaded, bad)[0], pad_id=0)
    numbers = [engine.submit(running), engine.submit(failing)]
    events = [event for _ in range(5) for event in engine.step()]
    assert [one.request for one in events if isinstance(one, FailureEvent)] == [numbers[1]]
    numbers[1] = engine.submit(later)
    while engine.busy:
        events.extend(engine.step())
    done = [one for one in events if isinstance(one, SampleEvent)]
    for number, samples in zip(numbers, expected, strict=True):
        assert not isinstance(samples, Failure)
        ids = {one.sample: one.generated.response_ids for one in done if one.request == number}
        assert ids == {k: one.response_ids for k, one in enumerate(samples)}


@BOTH
def test_samples_may_end_as_they_begin(tiny: TinyModel, kind: str) -> None:
    """With their first token, while as many as there is room for are being written."""
    loaded = tiny(kind)
    engine = GenerationEngine(loaded[0], pad_id=loaded[1].pad_token_id)
    requests = [SampleRequest([5, 6], range(16), 8), SampleRequest([7, 8], range(4), 8)]
    expected = engine.sample(requests)[1]
    assert not isinstance(expected, Failure)
    ends = frozenset({expected[0].response_ids[0]})
    engine.submit(requests[0])
    events = [*engine.step(), *engine.step()]
    number = engine.submit(replace(requests[1], eos_ids=ends))
    while engine.busy:
        events.extend(engine.step())
    done = {
        one.sample: one.generated.response_ids
        for one in events
        if isinstance(one, SampleEvent) and one.request == number
    }
    assert done[0] == expected[0].response_ids[:1]
    for sample, ids in done.items():
        assert ids == expected[sample].response_ids[: len(ids)]
    assert len([one for one in events if isinstance(one, SampleEvent)]) == 20
