"""A generation engine on vLLM, in this process, with the steps and events of our own engine."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lmcot.config import Dtype, LoraSettings, VllmSettings
from lmcot.models.generation.requests import (
    EngineLost,
    Event,
    FailureEvent,
    FinishReason,
    Generated,
    Request,
    SampleEvent,
    SampleRequest,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
    unfit,
)
from lmcot.models.generation.vllm_start import MOST_LOGPROBS, refusals, start_vllm
from lmcot.models.generation.vllm_weights import reload
from lmcot.records import Failure, FailureKind

_COLDEST, _HOTTEST = 0.01, 2.0
"""vLLM raises a lower temperature to the first, and refuses a higher one than the second."""


@dataclass(eq=False)
class _Sample:
    """One sample in progress."""

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(eq=False)
class _Reading:
    """Continuations of a `ScoreRequest` that differ only in their last token."""

    start: int
    """Length of the prompt."""
    before: tuple[int, ...]
    """The tokens that they share."""
    indices: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Task:
    """One request that is waiting or in flight."""

    number: int
    request: Request
    parts: dict[str, _Sample | _Reading] = field(default_factory=dict)
    """Its unfinished parts, by their names in vLLM."""
    logprobs: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Those of the continuations that were read, by index."""


class VllmEngine:
    """Samples from one model and scores with it, with vLLM's scheduler, cache and kernels.

    The engine is not thread-safe; `SharedEngine` serves many threads. Results differ from those of
    `GenerationEngine` by rounding, and the same seeds draw other samples.

    Args:
        lora: of the adapters that `load_adapters` will be given, if any.
        sleeps: whether `sleep` will be called.

    Raises:
        UserError: if vLLM does not run the model.
    """

    def __init__(
        self,
        source: str,
        dtype: Dtype,
        settings: VllmSettings,
        lora: LoraSettings | None = None,
        *,
        sleeps: bool = False,
    ) -> None:
        self._vllm: Any = start_vllm(source, dtype, settings, lora, sleeps=sleeps)
        self._processes = settings.tensor_parallel
        # Once it has started, the package's parts may be imported.
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._params = SamplingParams
        self._parts_come = RequestOutputKind.DELTA
        self._vocabulary = int(self._vllm.model_config.get_vocab_size())
        self._window = int(self._vllm.model_config.max_model_len)
        self.notice = ""
        self._tasks: dict[int, _Task] = {}
        self._numbers = 0
        self._ends: list[Event] = []
        self._adapters: Any = None
        """vLLM's name of the adapters that it samples with, or None."""
        self._adapters_seen = 0
        self._try_out()

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests or pending events."""
        return bool(self._tasks or self._ends)

    @property
    def waiting(self) -> set[int]:
        """Numbers of requests that are done with their event pending."""
        return {event.request for event in self._ends}

    def submit(self, request: Request) -> int:
        """Queues a request and returns the number that its events carry.

        An invalid request results in a `FailureEvent`.
        """
        self._numbers += 1
        failure = unfit(request, self._vocabulary, self._window, False) or _beyond(request)
        if failure is not None:
            self._ends.append(FailureEvent(self._numbers, failure))
            return self._numbers
        task = _Task(self._numbers, request)
        self._tasks[task.number] = task
        if isinstance(request, SampleRequest):
            self._add_samples(task, request)
        else:
            self._add_readings(task, request)
        return self._numbers

    def cancel(self, number: int) -> None:
        """Cancels a request; no more events follow."""
        self._ends = [event for event in self._ends if event.request != number]
        task = self._tasks.pop(number, None)
        if task is not None:
            self._vllm.abort_request(list(task.parts))

    def step(self) -> list[Event]:
        """Runs one pass over the requests in flight and returns its events.

        After an error, call `reset` before the next step.

        Raises:
            EngineLost: if a process among which the model is divided has died.
        """
        self._expire()
        found: list[Event] = []
        if self._tasks:
            for output in self._pass():
                found.extend(self._read(output))
        events, self._ends = [*self._ends, *found], []
        return events

    def _pass(self) -> list[Any]:
        try:
            return list(self._vllm.step())
        except Exception as error:
            if self._processes > 1 and self._vllm.model_executor.is_failed:
                raise EngineLost("a process of vLLM has died") from error
            raise

    def reset(self) -> None:
        """Drops all requests in flight."""
        for number in list(self._tasks):
            self.cancel(number)
        self._vllm.reset_prefix_cache()

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes new weights in place, by their names in a Hugging Face folder.

        Raises:
            RuntimeError: if a request is in flight, since its tokens would mix two versions.
        """
        self._check_idle()
        reload(self._vllm, tensors, self._processes)
        self._forget_prefixes()

    def sleep(self) -> None:
        """Frees the GPU's memory of weights, keys and values until `wake`; without one, nothing.

        The host keeps the weights meanwhile.

        Raises:
            RuntimeError: if a request is in flight.
        """
        self._check_idle()
        self._vllm.sleep(level=1)

    def wake(self) -> None:
        """Takes the GPU's memory back, with the weights of before."""
        self._vllm.wake_up()

    def load_adapters(self, folder: Path) -> None:
        """Takes adapters from a folder in peft's format, in place of those before.

        The folder is not read again.

        Raises:
            UserError: if vLLM has no adapters for layers that these are for.
            RuntimeError: if a request is in flight, since its tokens would mix two versions.
        """
        from vllm.lora.request import LoRARequest

        self._check_idle()
        self._adapters_seen += 1
        number = self._adapters_seen
        adapters = LoRARequest(f"adapters-{number}", number, str(folder))
        with refusals("vLLM does not take the adapters of policy.lora"):
            taken = self._vllm.add_lora(adapters)
        if not taken or self._vllm.list_loras() != {number}:
            raise RuntimeError("vLLM did not take the adapters in place of those before")
        self._adapters = adapters
        self._forget_prefixes()

    def _check_idle(self) -> None:
        if self._tasks:
            raise RuntimeError(f"{len(self._tasks)} requests are at work with the old weights")

    def _forget_prefixes(self) -> None:
        if not self._vllm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the old weights")

    def close(self) -> None:
        """Ends the engine and frees its memory; another one may then be made in this process."""
        self._vllm.engine_core.shutdown()
        del self._vllm
        gc.collect()

    def _add_samples(self, task: _Task, request: SampleRequest) -> None:
        for index, seed in enumerate(request.seeds):
            params = self._params(
                temperature=request.temperature,
                max_tokens=request.max_new_tokens,
                seed=seed,
                logprobs=0,
                stop_token_ids=sorted(request.eos_ids),
                ignore_eos=True,
                detokenize=False,
                output_kind=self._parts_come,
            )
            self._add(task, request.prompt_ids, params, _Sample(index))

    def _add_readings(self, task: _Task, request: ScoreRequest) -> None:
        readings: dict[tuple[int, ...], _Reading] = {}
        for index, continuation in enumerate(request.continuations):
            before = tuple(continuation[:-1])
            reading = readings.setdefault(before, _Reading(len(request.prompt_ids), before))
            reading.indices.append(index)
        for reading in readings.values():
            params = self._params(
                temperature=0.0,
                max_tokens=1,
                # What asks for it reads its whole prompt, also what is cached of it.
                prompt_logprobs=0 if reading.before else None,
                logprob_token_ids=sorted(_last_tokens(request, reading)),
                ignore_eos=True,
                detokenize=False,
                output_kind=self._parts_come,
            )
            self._add(task, (*request.prompt_ids, *reading.before), params, reading)

    def _add(self, task: _Task, ids: Sequence[int], params: Any, part: _Sample | _Reading) -> None:
        name = f"{task.number}.{len(task.parts)}"
        task.parts[name] = part
        prompt = {"prompt_token_ids": list(ids)}
        self._vllm.add_request(name, prompt, params, lora_request=self._adapters)

    def _read(self, output: Any) -> list[Event]:
        """The events of what vLLM says of one part of a request."""
        task = self._tasks.get(int(output.request_id.partition(".")[0]))
        part = None if task is None else task.parts.get(output.request_id)
        if task is None or part is None:  # cancelled, or ended by its own stop rule
            return []
        if isinstance(part, _Reading):
            return self._score(task, output, part)
        found = output.outputs[0]
        events: list[Event] = []
        for token, values in zip(found.token_ids, found.logprobs, strict=True):
            events.extend(self._take(task, output.request_id, part, token, values[token].logprob))
            if output.request_id not in task.parts or task.number not in self._tasks:
                return events
        if output.finished:
            events.append(self._fail(task, f"vLLM ended it: {found.finish_reason}"))
        return events

    def _take(
        self, task: _Task, name: str, sample: _Sample, token: int, logprob: float
    ) -> list[Event]:
        """Takes one token of a sample."""
        request = task.request
        assert isinstance(request, SampleRequest)
        if not math.isfinite(logprob):
            return [self._fail(task, "the model's logits are not finite numbers")]
        sample.tokens.append(token)
        sample.logprobs.append(logprob)
        try:
            reason = _reason(request, sample.tokens)
        except Exception as error:  # raised by the stop rule of the request
            return [self._fail(task, f"its stop rule failed: {type(error).__name__}: {error}")]
        events: list[Event] = [TokenEvent(task.number, sample.index, token, logprob)]
        if reason is None:
            return events
        del task.parts[name]
        if reason == "stop":
            self._vllm.abort_request([name])
        if not task.parts:
            del self._tasks[task.number]
        done = Generated(tuple(sample.tokens), tuple(sample.logprobs), reason)
        return [*events, SampleEvent(task.number, sample.index, done)]

    def _score(self, task: _Task, output: Any, reading: _Reading) -> list[Event]:
        """Reads the log-probabilities of continuations."""
        request = task.request
        assert isinstance(request, ScoreRequest)
        shared = tuple(
            output.prompt_logprobs[reading.start + place][token].logprob
            for place, token in enumerate(reading.before)
        )
        last: Mapping[int, Any] = output.outputs[0].logprobs[0]
        for index in reading.indices:
            token = request.continuations[index][-1]
            task.logprobs[index] = (*shared, last[token].logprob)
            if any(math.isnan(value) for value in task.logprobs[index]):
                return [self._fail(task, "the model's logits are not finite numbers")]
        del task.parts[output.request_id]
        if task.parts:
            return []
        del self._tasks[task.number]
        found = tuple(task.logprobs[index] for index in range(len(request.continuations)))
        return [ScoreEvent(task.number, found)]

    def _fail(self, task: _Task, reason: str, kind: FailureKind = FailureKind.PERMANENT) -> Event:
        self.cancel(task.number)
        return FailureEvent(task.number, Failure(kind, reason))

    def _expire(self) -> None:
        now = time.monotonic()
        for task in list(self._tasks.values()):
            deadline = task.request.deadline
            if deadline is not None and deadline < now:
                reason = "its deadline passed while it was at work"
                late = self._fail(task, reason, FailureKind.TRANSIENT)
                self._ends.append(late)

    def _try_out(self) -> None:
        """Has the model read and write: vLLM prepares some kernels only then, which takes seconds.

        Raises:
            RuntimeError: if it cannot.
        """
        self.submit(SampleRequest([0], seeds=[0], max_new_tokens=1))
        while self.busy:
            for event in self.step():
                if isinstance(event, FailureEvent):
                    raise RuntimeError(event.failure.reason)


def _beyond(request: Request) -> Failure | None:
    """The failure of a request that vLLM would change, or refuse; None if it takes it."""
    if isinstance(request, SampleRequest):
        if request.temperature and not _COLDEST <= request.temperature <= _HOTTEST:
            reason = (
                f"the temperature is {request.temperature:g}, but vLLM takes {_COLDEST:g} to "
                f"{_HOTTEST:g}"
            )
            return Failure(FailureKind.PERMANENT, reason)
        return None
    if len(request.continuations) > MOST_LOGPROBS:
        reason = f"vLLM scores at most {MOST_LOGPROBS} continuations at once"
        return Failure(FailureKind.PERMANENT, reason)
    return None


def _reason(request: SampleRequest, tokens: list[int]) -> FinishReason | None:
    """Why a sample ends with its last token; None if it does not."""
    if tokens[-1] in request.eos_ids:
        return "eos"
    if request.stop is not None and request.stop(tokens):
        return "stop"
    return "length" if len(tokens) == request.max_new_tokens else None


def _last_tokens(request: ScoreRequest, reading: _Reading) -> set[int]:
    return {request.continuations[index][-1] for index in reading.indices}
