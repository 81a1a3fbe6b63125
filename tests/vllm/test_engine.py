"""The engine on vLLM against plain passes of transformers, and its way with bad requests."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from scipy.stats import chisquare  # type: ignore[import-untyped]

from lmcot.config import VllmSettings
from lmcot.errors import UserError
from lmcot.models.generation.requests import (
    EngineLost,
    Event,
    FailureEvent,
    Generated,
    Request,
    SampleEvent,
    SampleRequest,
    ScoreEvent,
    ScoreRequest,
)
from lmcot.models.generation.vllm_engine import VllmEngine
from lmcot.records import FailureKind
from tests.vllm.conftest import make_model, plain, plain_logprobs

# How far log-probabilities may lie from a plain pass: any one, and in the root mean square. In
# bfloat16 a plain pass itself lies 0.03 (root mean square) from one in float32, single ones 0.3.
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (0.4, 0.06)}
PROMPTS = ((30, 40, 50, 60), tuple(range(20, 80)), (*range(20, 60), 7))
SETTINGS = VllmSettings(cache_gib=0.1)


class Pair:
    """The engine, and the same model on transformers."""

    def __init__(self, source: str, dtype: Any, settings: VllmSettings = SETTINGS) -> None:
        self.dtype = dtype
        self.engine = VllmEngine(source, dtype, settings)
        self.model = plain(source, dtype)
        self.tolerance, self.mean_tolerance = TOLERANCE[dtype]

    def run(self, *requests: Request) -> list[list[Event]]:
        """The events of each request."""
        numbers = [self.engine.submit(request) for request in requests]
        events: list[Event] = []
        while self.engine.busy:
            events.extend(self.engine.step())
        return [[one for one in events if one.request == number] for number in numbers]

    def samples(self, request: SampleRequest) -> list[Generated]:
        """All samples of a request."""
        (events,) = self.run(request)
        found = {one.sample: one.generated for one in events if isinstance(one, SampleEvent)}
        return [found[index] for index in range(len(request.seeds))]

    def failure(self, request: Request) -> tuple[FailureKind, str]:
        """The kind and the reason of a request's failure."""
        (events,) = self.run(request)
        last = events[-1]
        assert isinstance(last, FailureEvent)
        return last.failure.kind, last.failure.reason

    def check_logprobs(
        self, prompt: tuple[int, ...], samples: list[Generated], temperature: float
    ) -> None:
        """Checks the log-probabilities of a prompt's samples against plain passes."""
        scale = temperature or 1.0
        differences = []
        for one in samples:
            rows = plain_logprobs(self.model, (*prompt, *one.response_ids), scale)
            rows = rows[len(prompt) - 1 : -1]
            wanted = rows.gather(1, torch.tensor(one.response_ids)[:, None])[:, 0]
            differences.append(torch.tensor(one.logprobs) - wanted)
            if temperature == 0:
                assert bool((wanted > rows.max(dim=1).values - 2 * self.tolerance).all())
        found = torch.cat(differences) * scale
        assert float(found.abs().max()) < self.tolerance
        assert float(found.square().mean().sqrt()) < self.mean_tolerance


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, folder: str) -> Iterator[Pair]:
    made = Pair(folder, request.param)
    yield made
    made.engine.close()


@pytest.fixture
def single(folder: str, pair: Pair) -> Pair:
    """The pair in float32 only."""
    if pair.dtype != "float32":
        pytest.skip("it does not depend on the arithmetic")
    return pair


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_carry_the_logprobs_of_what_they_were_drawn_from(
    pair: Pair, temperature: float
) -> None:
    """Greedy ones are the likeliest, up to ties within the tolerance."""
    requests = [SampleRequest(ids, [1, 2, 3, 4], 24, temperature) for ids in PROMPTS]
    for request, events in zip(requests, pair.run(*requests), strict=True):
        ends = [one for one in events if isinstance(one, SampleEvent)]
        assert sorted(one.sample for one in ends) == [0, 1, 2, 3]
        texts = {one.generated.response_ids for one in ends}
        assert len(texts) == (1 if temperature == 0 else 4)
        assert {one.generated.finish_reason for one in ends} == {"length"}
        pair.check_logprobs(tuple(request.prompt_ids), [one.generated for one in ends], temperature)


def test_scores_are_those_of_a_plain_pass(pair: Pair) -> None:
    """Of single tokens, which read the cached prompt, and of longer texts, in one request."""
    continuations = ([5], [6], [300], [5, 6, 7], [5, 6, 8], list(range(100, 140)))
    for prompt in PROMPTS:
        for _ in range(2):
            ((event,),) = pair.run(ScoreRequest(prompt, continuations))
            assert isinstance(event, ScoreEvent)
            for asked, found in zip(continuations, event.logprobs, strict=True):
                rows = plain_logprobs(pair.model, (*prompt, *asked))[len(prompt) - 1 : -1]
                wanted = rows.gather(1, torch.tensor(asked).unsqueeze(1)).squeeze(1)
                assert torch.tensor(found).sub(wanted).abs().max() < pair.tolerance


def test_seeds_draw_from_the_models_distribution(single: Pair) -> None:
    prompt, temperature, draws = PROMPTS[0], 1.5, 4000
    request = SampleRequest(prompt, list(range(draws)), 1, temperature)
    drawn = torch.tensor([one.response_ids[0] for one in single.samples(request)])
    chances = plain_logprobs(single.model, prompt, temperature)[-1].exp()
    top = chances.topk(20).indices
    counts = torch.stack([(drawn == token).sum() for token in top]).tolist()
    expected = (chances[top] * draws).tolist()
    rest = draws - sum(counts)
    assert chisquare([*counts, rest], [*expected, draws - sum(expected)]).pvalue > 1e-4


def test_a_seed_repeats_its_sample(single: Pair) -> None:
    request = SampleRequest(PROMPTS[0], [5, 6, 2**63 - 1], 12)
    first = single.samples(request)
    again = single.samples(request)
    assert [one.response_ids for one in again] == [one.response_ids for one in first]
    assert len({one.response_ids for one in first}) == 3


def test_prompts_that_do_not_fit_into_one_pass_together_are_sampled_all(single: Pair) -> None:
    """By their seeds, as each one alone."""
    requests = [SampleRequest([place] * 400, [place, 7], 3) for place in range(20, 36)]
    together = single.run(*requests)
    for request, events in zip(requests, together, strict=True):
        ends = {one.sample: one.generated for one in events if isinstance(one, SampleEvent)}
        assert sorted(ends) == [0, 1], events
        single.check_logprobs(tuple(request.prompt_ids), list(ends.values()), 1.0)
    alone = single.samples(requests[5])
    assert [one.response_ids for one in alone] == [
        one.generated.response_ids
        for one in sorted(
            (event for event in together[5] if isinstance(event, SampleEvent)),
            key=lambda event: event.sample,
        )
    ]


def test_a_sample_ends_at_eos_or_by_its_rule(single: Pair) -> None:
    (free,) = single.samples(SampleRequest(PROMPTS[0], [3], 20))
    ids = free.response_ids
    place = next(i for i in range(4, 20) if ids[i] not in ids[:i])
    ended = SampleRequest(PROMPTS[0], [3], 20, eos_ids=frozenset({ids[place], 391}))
    (one,) = single.samples(ended)
    assert (one.response_ids, one.finish_reason) == (ids[: place + 1], "eos")
    stopped = SampleRequest(PROMPTS[0], [3], 20, stop=lambda tokens: len(tokens) == 5)
    (one,) = single.samples(stopped)
    assert (one.response_ids, one.finish_reason) == (ids[:5], "stop")

    def broken(tokens: object) -> bool:
        raise ValueError("no such token")

    kind, reason = single.failure(SampleRequest(PROMPTS[0], [3, 4], 20, stop=broken))
    assert (kind, reason) == (
        FailureKind.PERMANENT, "its stop rule failed: ValueError: no such token",
    )  # fmt: skip
    assert not single.engine.busy


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (SampleRequest([], [1], 4), "the prompt is empty"),
        (SampleRequest([5000], [1], 4), "a token is not among the model's"),
        (SampleRequest([1] * 500, [1], 13), "500 tokens and 13 tokens after it do not fit into"),
        (SampleRequest([1], [1], 4, 0.005), "the temperature is 0.005, but vLLM takes 0.01 to 2"),
        (SampleRequest([1], [1], 4, 2.5), "the temperature is 2.5, but vLLM takes 0.01 to 2"),
        (ScoreRequest([1], [[2]] * 129), "at most 128 continuations"),
        (SampleRequest([1], [1], 4, deadline=time.monotonic()), "its deadline passed"),
    ],
)
def test_what_cannot_be_done_fails_alone(single: Pair, request_: Request, said: str) -> None:
    others = SampleRequest([1] * 500, [1], 12), ScoreRequest([1] * 500, [[2] * 12])
    failed, *fine = single.run(request_, *others)
    (event,) = failed
    assert isinstance(event, FailureEvent)
    assert said in event.failure.reason
    assert isinstance(fine[0][-1], SampleEvent)
    assert isinstance(fine[1][-1], ScoreEvent)


def test_a_cancelled_request_says_no_more(single: Pair) -> None:
    number = single.engine.submit(SampleRequest(PROMPTS[0], [1, 2], 50))
    assert single.engine.step()
    single.engine.cancel(number)
    assert not single.engine.busy
    assert len(single.samples(SampleRequest(PROMPTS[0], [1], 3))) == 1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_weights_are_taken_in_place(tmp_path: Path, tied: bool) -> None:
    """All of them, the output layer too; nothing that was cached with the old ones is used."""
    old, new = (make_model(tmp_path / str(seed), seed=seed, tied=tied) for seed in (1, 2))
    pair = Pair(old, "float32")
    try:
        request = SampleRequest(PROMPTS[1], [1, 2], 12)
        pair.check_logprobs(PROMPTS[1], pair.samples(request), 1.0)
        pair.engine.submit(request)
        with pytest.raises(RuntimeError, match="1 requests are at work with the old weights"):
            pair.engine.load([])
        pair.engine.reset()
        pair.model = plain(new, "float32")
        pair.engine.load(pair.model.named_parameters())
        pair.check_logprobs(PROMPTS[1], pair.samples(request), 1.0)
        with torch.no_grad():
            pair.model.model.norm.weight.fill_(math.nan)
        pair.engine.load(pair.model.named_parameters())
        assert "not finite" in pair.failure(request)[1]
        assert "not finite" in pair.failure(ScoreRequest(PROMPTS[0], [[5]]))[1]
    finally:
        pair.engine.close()


def test_a_model_that_vllm_has_no_kernels_for_is_refused() -> None:
    said = r"^vLLM does not run the model of 'random:llama': its attention heads have 16 elements"
    with pytest.raises(UserError, match=said):
        VllmEngine("random:llama", "float32", SETTINGS)


def test_other_errors_of_a_start_are_not_taken_for_refusals(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU without enough memory is told as such, an error of vLLM's own as it is."""
    from vllm.v1.engine.llm_engine import LLMEngine

    def fail(config: Any, **_: object) -> None:
        assert config.cache_config.kv_cache_memory_bytes == int(SETTINGS.cache_gib * 2**30)
        assert config.cache_config.gpu_memory_utilization < 0.05, "others may share the GPU"
        raise error

    monkeypatch.setattr(LLMEngine, "from_vllm_config", fail)
    error: Exception = torch.OutOfMemoryError("tried to allocate 80 GiB")
    with pytest.raises(UserError, match=r"GPU's memory does not suffice; lower cache_gib, .*80"):
        VllmEngine(folder, "float32", SETTINGS)
    error = RuntimeError("the loader broke")
    with pytest.raises(RuntimeError, match=r"^the loader broke$"):
        VllmEngine(folder, "float32", SETTINGS)


def test_a_model_divided_among_processes_gives_the_same(folder: str, tmp_path: Path) -> None:
    """It takes new weights in place too; when one of its processes dies, the engine is lost."""
    pair = Pair(folder, "float32", SETTINGS.model_copy(update={"tensor_parallel": 2}))
    workers = psutil.Process().children(recursive=True)
    try:
        request = SampleRequest(PROMPTS[1], [1, 2], 12)
        pair.check_logprobs(PROMPTS[1], pair.samples(request), 1.0)
        pair.model = plain(make_model(tmp_path / "new", seed=2), "float32")
        pair.engine.load(pair.model.named_parameters())
        pair.check_logprobs(PROMPTS[1], pair.samples(request), 1.0)
        pair.engine.submit(SampleRequest(PROMPTS[0], [1], 400))
        pair.engine.step()
        victim = next(one for one in workers if "Worker" in one.name() or "spawn" in str(one))
        victim.kill()
        with pytest.raises(EngineLost, match="a process of vLLM has died"):
            pair.run(SampleRequest(PROMPTS[0], [2], 400))
    finally:
        pair.engine.close()
