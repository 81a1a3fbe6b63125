"""The generation engine: requests join and leave at any step, and every token is an event."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcot.models.generation.plain_decoder import PlainDecoder
from lmcot.models.generation.requests import (
    Event,
    FailureEvent,
    Generated,
    Request,
    SampleEvent,
    SampleRequest,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
    unfit,
)
from lmcot.models.generation.sampling import pick
from lmcot.models.generation.takeover import refusal
from lmcot.models.generation.tree_decoder import TreeDecoder
from lmcot.models.generation.work import (
    Decoder,
    Logits,
    Row,
    Task,
    Wanted,
    make_rows,
)
from lmcot.models.limits import window_of
from lmcot.records import Failure, FailureKind

Scores = tuple[tuple[float, ...], ...]
"""Log-probabilities (natural log) of each token of each continuation of one request."""


class GenerationEngine:
    """Samples from one model and scores with it, many requests at once.

    The engine is not thread-safe. The same requests, submitted in the same order to an idle engine
    that keeps no prefixes, give bitwise the same results; batched with other requests, results
    only differ by rounding.

    Args:
        model: a model of either architecture, which others may use between requests.
        max_batch_tokens: maximum tokens per pass; a longer prompt takes several passes. Samples
            come first and are limited to this number; besides them, each pass reads at least 64
            tokens of waiting prompts.
        max_cached_tokens: maximum tokens whose keys and values are cached; requests wait for room.
        keep_prefix_tokens: maximum tokens of finished prompts that are cached for later prompts
            with the same prefix; the least recently used are evicted first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        max_batch_tokens: int = 2048,
        max_cached_tokens: int = 32768,
        keep_prefix_tokens: int = 0,
    ) -> None:
        self.model = model
        self._encoder_decoder = bool(model.config.is_encoder_decoder)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._window = window_of(model.config)
        tree = partial(
            TreeDecoder,
            model,
            pad_id=pad_id,
            max_batch_tokens=max_batch_tokens,
            max_cached_tokens=max_cached_tokens,
            keep_prefix_tokens=keep_prefix_tokens,
        )
        self._new_decoder: Callable[[], Decoder] = tree
        first = tree()
        self._decoder: Decoder = first
        reason = refusal(first)
        self.notice = ""
        """Says that the engine uses the plain path, and why; otherwise empty."""
        if reason is not None:
            name = type(model).__name__
            self.notice = f"{name} generates on the plain path, without shared prompts: {reason}"
            self._new_decoder = partial(
                PlainDecoder, model, pad_id=pad_id, max_batch_tokens=max_batch_tokens
            )
            self._decoder = self._new_decoder()
        self._numbers = 0
        self._queue: deque[Task] = deque()
        self._working: dict[int, Task] = {}
        self._ends: list[Event] = []
        """Pending events of requests that end without a forward pass."""

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests or pending events."""
        return bool(self._queue or self._working or self._ends)

    @property
    def waiting(self) -> set[int]:
        """Numbers of requests that are queued, or done with their event pending."""
        return {task.number for task in self._queue} | {event.request for event in self._ends}

    def submit(self, request: Request) -> int:
        """Queues a request and returns the number that its events carry.

        An invalid request results in a `FailureEvent`.
        """
        self._numbers += 1
        failure = unfit(request, self._vocabulary, self._window, self._encoder_decoder)
        if failure is not None:
            self._ends.append(FailureEvent(self._numbers, failure))
            return self._numbers
        task = Task(self._numbers, request)
        if isinstance(request, ScoreRequest):
            task.logprobs = [[] for _ in request.continuations]
        self._queue.append(task)
        return self._numbers

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Cancels a queued or running request; no more events follow."""
        self._queue = deque(task for task in self._queue if task.number != number)
        self._ends = [event for event in self._ends if event.request != number]
        task = self._working.pop(number, None)
        if task is not None:
            self._decoder.release(task)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Runs one forward pass over the requests in flight and returns its events.

        After an error, call `reset` before the next step.
        """
        expired = self._expire()
        self._ends.extend(expired)
        while self._queue and self._decoder.fits(self._queue[0]):
            task = self._queue.popleft()
            self._working[task.number] = task
            self._decoder.admit(task)
        drawn = self._advance(self._decoder.forward()) if self._working else []
        events, self._ends = [*self._ends, *drawn], []
        return events

    def reset(self) -> None:
        """Drops all requests in flight and the cache, which an error may have left
        inconsistent; queued requests are kept."""
        self._working.clear()
        self._decoder = self._new_decoder()

    def close(self) -> None:
        """Drops all requests and the cache; the model is its owner's."""
        self._queue.clear()
        self.reset()

    def sample(self, requests: Seq[SampleRequest]) -> list[list[Generated] | Failure]:
        """All samples of each request, in order; the engine must be idle."""
        return [samples_of(ends) for ends in self._run(requests)]

    def score(self, requests: Seq[ScoreRequest]) -> list[Scores | Failure]:
        """Log-probabilities (natural log) of each token of each continuation of each request."""
        return [scores_of(ends) for ends in self._run(requests)]

    def weights_changed(self) -> None:
        """Drops what was cached with the old weights.

        Raises:
            RuntimeError: if a request is in flight, since its tokens would mix two versions.
        """
        if self._working:
            raise RuntimeError(f"{len(self._working)} requests are at work with the old weights")
        self._decoder.clear()

    def _run(self, requests: Seq[Request]) -> list[list[Event]]:
        """Runs requests to the end and returns the events of each, except token events."""
        if self.busy:
            raise RuntimeError("the engine is at work on other requests")
        numbers = {self.submit(request): index for index, request in enumerate(requests)}
        ends: list[list[Event]] = [[] for _ in requests]
        while self.busy:
            for event in self.step():
                if not isinstance(event, TokenEvent):
                    ends[numbers[event.request]].append(event)
        return ends

    def _expire(self) -> list[Event]:
        now = time.monotonic()

        def late(task: Task) -> bool:
            return task.request.deadline is not None and task.request.deadline < now

        waited = [task for task in self._queue if late(task)]
        worked = [task for task in self._working.values() if late(task)]
        for task in (*waited, *worked):
            self.cancel(task.number)
        kind = FailureKind.TRANSIENT
        queued, working = (f"its deadline passed while it was {w}" for w in ("queued", "at work"))
        return [
            *(_failed(task, kind, queued) for task in waited),
            *(_failed(task, kind, working) for task in worked),
        ]

    def _advance(self, logits: Logits) -> list[Event]:
        """Draws tokens for running and new rows and collects scores."""
        rows, sources = list(logits.rows), list(range(len(logits.rows)))
        at = len(rows)
        scored: list[tuple[Wanted, Tensor]] = []
        for wanted in logits.wanted:
            task = wanted.sequence.task
            if isinstance(task.request, SampleRequest):
                new = make_rows(task, 0)
                self._decoder.spawn(wanted.sequence, new)
                rows.extend(new)
                sources.extend([at] * len(new))
            else:
                scored.append((wanted, logits.values[at : at + wanted.length]))
            at += wanted.length
        events = self._draw(rows, logits.values, sources) if rows else []
        for wanted, values in scored:
            events.extend(self._score(wanted, values))
        return events

    def _draw(self, rows: list[Row], values: Tensor, sources: list[int]) -> list[Event]:
        """Draws one token for each row from its logits."""
        if sources != list(range(len(values))):
            values = values[torch.tensor(sources, device=values.device)]
        heat = [float(row.request.temperature) for row in rows]
        temperatures = torch.tensor(heat, dtype=torch.float32, device=values.device)
        chances = [row.uniforms[len(row.tokens)] for row in rows]
        uniform = torch.tensor(chances, dtype=torch.float64)
        drawn, logprobs, valid = pick(values, temperatures, uniform)
        events: list[Event] = []
        for row, token, logprob, sound in zip(
            rows, drawn.tolist(), logprobs.tolist(), valid.tolist(), strict=True
        ):
            if row.task.number not in self._working:
                continue  # another sample of the request has failed
            if sound:
                events.extend(self._take(row, token, logprob))
            else:
                events.append(self._not_finite(row.task))
        return events

    def _take(self, row: Row, token: int, logprob: float) -> list[Event]:
        task = row.task
        try:
            reason = row.take(token, logprob)
        except Exception as error:  # raised by the stop rule of the request
            self._end(task)
            why = f"its stop rule failed: {type(error).__name__}: {error}"
            return [_failed(task, FailureKind.PERMANENT, why)]
        events: list[Event] = [TokenEvent(task.number, row.sample, token, logprob)]
        if reason is not None:
            self._decoder.remove(row)
            generated = row.generated(reason)
            events.append(SampleEvent(task.number, row.sample, generated))
            task.samples += 1
            if task.samples == len(row.request.seeds):
                self._end(task)
        return events

    def _score(self, wanted: Wanted, values: Tensor) -> list[Event]:
        """Collects the log-probabilities from some logits of a sequence."""
        task = wanted.sequence.task
        request = task.request
        assert isinstance(request, ScoreRequest)
        if task.number not in self._working:
            return []
        first = wanted.first - wanted.sequence.wanted_from
        scores = values.float()
        total = scores.logsumexp(-1)
        if not bool(total.isfinite().all()):
            return [self._not_finite(task)]
        for index in wanted.sequence.continuations:
            tokens = request.continuations[index][first : first + wanted.length]
            at = torch.tensor(tokens, device=scores.device).unsqueeze(-1)
            task.logprobs[index].extend((scores.gather(-1, at).squeeze(-1) - total).tolist())
        if any(
            len(found) < len(asked)
            for found, asked in zip(task.logprobs, request.continuations, strict=True)
        ):
            return []
        self._end(task)
        return [ScoreEvent(task.number, tuple(tuple(one) for one in task.logprobs))]

    def _end(self, task: Task) -> None:
        del self._working[task.number]
        self._decoder.release(task)

    def _not_finite(self, task: Task) -> Event:
        self._end(task)
        return _failed(task, FailureKind.PERMANENT, "the model's logits are not finite numbers")


def samples_of(ends: Seq[Event]) -> list[Generated] | Failure:
    """The samples of one request, in order, or its failure, from its events."""
    samples = {one.sample: one.generated for one in ends if isinstance(one, SampleEvent)}
    return _failure(ends) or [samples[sample] for sample in sorted(samples)]


def scores_of(ends: Seq[Event]) -> Scores | Failure:
    """The scores of one request, or its failure, from its events."""
    scores = [one.logprobs for one in ends if isinstance(one, ScoreEvent)]
    return _failure(ends) or scores[0]


def _failure(ends: Seq[Event]) -> Failure | None:
    return next((one.failure for one in ends if isinstance(one, FailureEvent)), None)


def _failed(task: Task, kind: FailureKind, reason: str) -> FailureEvent:
    return FailureEvent(task.number, Failure(kind, reason))
