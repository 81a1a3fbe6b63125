"""A generation engine shared by many threads."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lmcot.models.generation.engine import Scores, samples_of, scores_of
from lmcot.models.generation.requests import (
    EngineLost,
    Event,
    FailureEvent,
    Generated,
    Request,
    SampleRequest,
    ScoreRequest,
    TokenEvent,
)
from lmcot.records import Failure

_log = logging.getLogger("lmcot.generation")
Listener = Callable[[Event | BaseException], None]
"""Called with each event of a request, in the engine's thread; it must return at once."""


class Engine(Protocol):
    """What `GenerationEngine` and the engine on vLLM have in common."""

    notice: str
    """What the user should know of how it works; otherwise empty."""

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests or pending events."""
        ...

    @property
    def waiting(self) -> set[int]:
        """Numbers of requests that an error in a step does not concern."""
        ...

    def submit(self, request: Request) -> int:
        """Queues a request and returns the number that its events carry."""
        ...

    def cancel(self, number: int) -> None:
        """Cancels a request; no more events follow."""
        ...

    def step(self) -> list[Event]:
        """Runs one pass and returns its events."""
        ...

    def reset(self) -> None:
        """Drops all requests in flight."""
        ...

    def close(self) -> None:
        """Frees its memory; it is not asked again."""
        ...


@dataclass(eq=False)
class Call:
    """The requests of one caller and their events so far."""

    requests: Sequence[Request]
    listener: Listener | None = None
    ends: list[list[Event]] = field(init=False)
    open: dict[int, int] = field(default_factory=dict)
    """Maps the engine's number of each unfinished request to its index in the call."""
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.ends = [[] for _ in self.requests]


class SharedEngine:
    """Batches the requests of all threads through one engine.

    A background thread steps the engine while there is work; new requests join at the next step.
    An error only ends the requests that were in flight.
    Results only differ by rounding from those of an engine used alone.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: deque[Call] = deque()
        self._cancelled: list[Call] = []
        self._calls: dict[int, Call] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        self._error: BaseException | None = None

    @property
    def notice(self) -> str:
        """The engine's notice; empty in most cases."""
        return self._engine.notice

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Generated] | Failure]:
        """Waits for all samples of each request and returns them in order."""
        return [samples_of(ends) for ends in self._run(requests)]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | Failure]:
        """Log-probabilities (natural log) of each token of each continuation of each request."""
        return [scores_of(ends) for ends in self._run(requests)]

    def listen(self, request: Request, listener: Listener) -> Call:
        """Submits a request without waiting; the listener gets each token, then the end.

        The end is the last `SampleEvent` or the `ScoreEvent`, a `FailureEvent`, or an error of the
        engine itself. If the listener raises, the call is cancelled.
        """
        call = Call([request], listener)
        self._add(call)
        return call

    def cancel(self, call: Call) -> None:
        """Cancels a call; no events follow after the engine's next step.

        Does nothing if the call is done.
        """
        with self._changed:
            self._cancelled.append(call)
            self._changed.notify()

    def check_alive(self) -> None:
        """Checks that the engine can take requests.

        Raises:
            RuntimeError: if it has ended.
        """
        if self._closed or self._error is not None:
            raise RuntimeError("the generation engine has ended") from self._error

    def close(self) -> None:
        """Ends the thread and the engine, and fails all unfinished calls."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._engine.close()

    def _run(self, requests: Sequence[Request]) -> list[list[Event]]:
        if not requests:
            return []
        call = Call(requests)
        self._add(call)
        call.done.wait()
        if call.error is not None:
            raise RuntimeError("the generation engine failed") from call.error
        return call.ends

    def _add(self, call: Call) -> None:
        with self._changed:
            self.check_alive()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
                self._thread.start()
            self._waiting.append(call)
            self._changed.notify()

    def _work(self) -> None:
        try:
            while self._join():
                for event in self._step():
                    self._hand_out(event)
        except BaseException as error:  # raised again in every waiting thread
            self._end(error)
        else:
            self._end(RuntimeError("it was closed"))

    def _join(self) -> bool:
        """Waits for work if there is none, then submits new calls and drops cancelled ones;
        False once closed."""
        with self._changed:
            while not (self._waiting or self._cancelled or self._engine.busy or self._closed):
                self._changed.wait()
            joining, self._waiting = self._waiting, deque()
            leaving, self._cancelled = self._cancelled, []
            closed = self._closed
        for call in leaving:
            self._drop(call)
        for call in joining:
            if call in leaving:
                continue
            self._submit(call)
        return not closed

    def _submit(self, call: Call) -> None:
        try:
            for place, request in enumerate(call.requests):
                number = self._engine.submit(request)
                call.open[number] = place
                self._calls[number] = call
        except Exception as error:  # a field of the request has the wrong type
            self._fail(call, error)

    def _step(self) -> list[Event]:
        try:
            return self._engine.step()
        except EngineLost:
            raise  # it ends this engine too
        except Exception as error:
            kept = self._engine.waiting
            lost = {call for number, call in self._calls.items() if number not in kept}
            # If nothing was in flight, the next step would fail in the same way.
            lost = lost or set(self._calls.values())
            self._engine.reset()
            for call in lost:
                self._fail(call, error)
            return []

    def _fail(self, call: Call, error: BaseException) -> None:
        """Ends a call with an error."""
        self._drop(call)
        call.error = error
        call.done.set()
        self._tell(call, error)

    def _drop(self, call: Call) -> None:
        for number in call.open:
            self._engine.cancel(number)
            del self._calls[number]
        call.open.clear()

    def _tell(self, call: Call, event: Event | BaseException) -> bool:
        """Passes an event to the listener; False if the listener raised."""
        if call.listener is None:
            return True
        try:
            call.listener(event)
        except Exception as error:
            _log.warning("a listener failed, its request is given up: %r", error)
            return False
        return True

    def _hand_out(self, event: Event) -> None:
        call = self._calls.get(event.request)
        if call is None:  # cancelled during this step
            return
        if not self._tell(call, event):
            self._drop(call)
            return
        if isinstance(event, TokenEvent):
            return
        place = call.open[event.request]
        call.ends[place].append(event)
        if _is_over(call.requests[place], call.ends[place]):
            del call.open[event.request], self._calls[event.request]
            if not call.open:
                call.done.set()

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            calls = {*self._calls.values(), *self._waiting}
        for call in calls:
            call.error = error
            call.done.set()
            self._tell(call, error)


def _is_over(request: Request, ends: Sequence[Event]) -> bool:
    """Whether a request has ended; a failure always ends the whole request."""
    failed = isinstance(ends[-1], FailureEvent)
    return failed or isinstance(request, ScoreRequest) or len(ends) == len(request.seeds)
