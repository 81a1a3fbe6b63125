"""One engine, many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import (
    EngineLost,
    Event,
    FailureEvent,
    SampleRequest,
    ScoreRequest,
    TokenEvent,
)
from lmcot.models.generation.shared import Call, SharedEngine
from lmcot.records import Failure

EOS = 1


def _engine() -> GenerationEngine:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return GenerationEngine(LlamaForCausalLM(config).eval(), pad_id=0, max_batch_tokens=64)


@pytest.fixture
def shared() -> Iterator[SharedEngine]:
    engine = SharedEngine(_engine())
    yield engine
    engine.close()


def _samples(number: int) -> list[SampleRequest]:
    return [
        SampleRequest([2 + number, 5, 9 + place], [number, number + 1], 6, eos_ids=frozenset({EOS}))
        for place in range(3)
    ]


def _scores(number: int) -> list[ScoreRequest]:
    return [ScoreRequest([3, 4 + number], [[7, 8], [9]])]


def test_every_thread_gets_its_own_results(shared: SharedEngine) -> None:
    alone = _engine()
    sampled = [alone.sample(_samples(number)) for number in range(12)]
    scored = [alone.score(_scores(number)) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        samples = list(pool.map(lambda number: shared.sample(_samples(number)), range(12)))
        scores = list(pool.map(lambda number: shared.score(_scores(number)), range(12)))
    for ours, theirs in zip(samples, sampled, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert not isinstance(one, Failure)
            assert not isinstance(other, Failure)
            assert [s.response_ids for s in one] == [s.response_ids for s in other]
    for score, reference in zip(scores, scored, strict=True):
        assert not isinstance(score[0], Failure)
        assert not isinstance(reference[0], Failure)
        for values, wanted in zip(score[0], reference[0], strict=True):
            assert values == pytest.approx(wanted, abs=1e-4)


def test_what_threads_ask_goes_through_the_model_together() -> None:
    engine = _engine()
    shared = SharedEngine(engine)
    started, gate = threading.Event(), threading.Event()
    step, most = engine.step, 0

    def counted() -> list[Event]:
        nonlocal most
        started.set()
        gate.wait(10)
        events = step()
        most = max(most, len(engine._working))
        return events

    engine.step = counted  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(shared.sample, _samples(number)) for number in range(4)]
        started.wait(10)
        deadline = time.monotonic() + 10
        while len(shared._waiting) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.set()
        assert all(len(call.result(30)) == 3 for call in calls)
    shared.close()
    assert most > 3  # requests of more than one call


def test_a_bad_request_fails_alone(shared: SharedEngine) -> None:
    bad, good = SampleRequest([], [1], 4), SampleRequest([2, 3], [1], 4)
    found = shared.sample([bad, good])
    assert isinstance(found[0], Failure)
    assert not isinstance(found[1], Failure)


def test_an_error_of_the_engine_ends_what_is_at_work_and_nothing_else(
    shared: SharedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = shared._engine
    before = shared.sample(_samples(0))

    def broken() -> list[Event]:
        raise ValueError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_advance", lambda _: broken())
        for _ in range(2):
            with pytest.raises(RuntimeError, match="failed") as caught:
                shared.sample(_samples(0))
            assert isinstance(caught.value.__cause__, ValueError)
        bad = SampleRequest([], [1], 4)
        assert isinstance(shared.sample([bad])[0], Failure), "it needs no pass of the model"
    after = shared.sample(_samples(0))
    for one, other in zip(before, after, strict=True):
        assert not isinstance(one, Failure)
        assert not isinstance(other, Failure)
        assert [s.response_ids for s in one] == [s.response_ids for s in other]
    assert not engine.busy
    assert shared._calls == {}


def test_a_stop_rule_that_raises_ends_its_own_request_only(shared: SharedEngine) -> None:
    def broken(tokens: Sequence[int]) -> bool:
        if len(tokens) > 2:
            raise KeyError("a token without a text")
        return False

    bad = SampleRequest([2, 5, 9], [1, 2], 6, stop=broken)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(shared.sample, _samples(1))
        (found,) = shared.sample([bad])
    assert isinstance(found, Failure)
    assert "its stop rule failed: KeyError" in found.reason
    assert not any(isinstance(one, Failure) for one in good.result())
    assert not any(isinstance(one, Failure) for one in shared.sample(_samples(2)))


@pytest.mark.parametrize(
    "bad",
    [
        SampleRequest([2, 3], [], 4),
        SampleRequest([2, 3], [1], 0),
        SampleRequest([2, 3], [1], -5),
        SampleRequest([2, 3], [1], 10**12),
        SampleRequest([2, 3], [1], 4, temperature=-1.0),
        SampleRequest([2, 3], [-1], 4),
        SampleRequest([2, 10**6], [1], 4),
        ScoreRequest([2, 3], [[]]),
    ],
)
def test_requests_that_make_no_sense_fail_alone(
    shared: SharedEngine, bad: SampleRequest | ScoreRequest
) -> None:
    heard = Heard()
    shared.listen(bad, heard)
    assert heard.over.wait(30)
    assert isinstance(heard.events[-1], FailureEvent)
    assert not any(isinstance(one, Failure) for one in shared.sample(_samples(0)))


def test_what_is_no_request_at_all_fails_alone(shared: SharedEngine) -> None:
    odd: Any = SampleRequest(["a", "b"], [1], 4)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="failed"):
        shared.sample([odd])
    assert not any(isinstance(one, Failure) for one in shared.sample(_samples(0)))


def test_a_listener_that_raises_loses_its_request_and_ends_nothing(shared: SharedEngine) -> None:
    """As one whose event loop is closed."""
    told = threading.Event()

    def broken(event: Event | BaseException) -> None:
        told.set()
        raise RuntimeError("Event loop is closed")

    shared.listen(SampleRequest([2, 5], [1], 100), broken)
    shared.listen(SampleRequest([], [], 100), broken)
    assert told.wait(30)
    assert not any(isinstance(one, Failure) for one in shared.sample(_samples(0)))
    assert not shared._engine.busy


def test_an_engine_that_has_lost_a_process_ends_for_all() -> None:
    """Callers that wait and later ones learn why; a health check fails."""
    engine = _engine()
    shared = SharedEngine(engine)
    shared.check_alive()
    engine.step = Mock(side_effect=EngineLost("a process has died"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the generation engine failed") as told:
        shared.sample(_samples(0))
    assert isinstance(told.value.__cause__, EngineLost)
    for later in (shared.check_alive, lambda: shared.sample(_samples(0))):
        with pytest.raises(RuntimeError, match="the generation engine has ended") as told:
            later()
        assert isinstance(told.value.__cause__, EngineLost)
    shared.close()


def test_closed_engine_gives_up_what_is_at_work() -> None:
    shared = SharedEngine(_engine())
    assert shared.sample([]) == []
    shared.close()
    with pytest.raises(RuntimeError, match="has ended"):
        shared.sample(_samples(0))


class Heard:
    """A listener that keeps all it is told."""

    def __init__(self) -> None:
        self.events: list[Event | BaseException] = []
        self.tokens: dict[int, list[int]] = {}
        self.over = threading.Event()
        self.first = threading.Event()

    def __call__(self, event: Event | BaseException) -> None:
        self.events.append(event)
        if isinstance(event, TokenEvent):
            self.tokens.setdefault(event.sample, []).append(event.token_id)
            self.first.set()
        else:
            self.over.set()


def test_a_listener_hears_each_token_as_it_is_drawn(shared: SharedEngine) -> None:
    """And what it hears is what waiting gives."""
    request = SampleRequest([2, 5, 9], [7], 20)
    heard = Heard()
    shared.listen(request, heard)
    assert heard.over.wait(30)
    assert len(heard.events) == 21, "20 tokens, then the end"
    (waited,) = shared.sample([request])
    assert not isinstance(waited, Failure)
    assert heard.tokens[0] == list(waited[0].response_ids)


def test_a_cancelled_call_makes_room_and_nothing_more_comes_of_it(shared: SharedEngine) -> None:
    heard = Heard()
    call = shared.listen(SampleRequest([2, 5, 9], [7], 120), heard)
    assert heard.first.wait(30)
    shared.cancel(call)
    shared.sample(_samples(1))  # the engine goes on, with those that are left
    count = len(heard.events)
    shared.sample(_samples(2))
    assert len(heard.events) == count < 120
    assert not heard.over.is_set()
    shared.cancel(call)  # again does nothing
    assert not isinstance(shared.sample(_samples(3))[0], Failure)


def test_what_was_not_begun_can_be_cancelled(shared: SharedEngine) -> None:
    engine = shared._engine
    heard = Heard()
    with shared._changed:  # the engine's thread cannot take it up before it is cancelled
        call = Call([SampleRequest([2, 5], [7], 5)], heard)
        shared._waiting.append(call)
        shared._cancelled.append(call)
    shared.sample(_samples(1))
    assert heard.events == []
    assert not engine.busy


def test_a_listener_hears_of_the_engines_end() -> None:
    engine = _engine()
    shared, heard = SharedEngine(engine), Heard()

    def broken() -> list[Event]:
        raise ValueError("out of memory, say")

    engine.step = broken  # type: ignore[method-assign]
    shared.listen(SampleRequest([2, 5], [7], 5), heard)
    assert heard.over.wait(30)
    assert isinstance(heard.events[-1], ValueError)
