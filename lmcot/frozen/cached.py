"""A frozen LM behind its cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from lmcot.frozen.cache import ReplyCache
from lmcot.frozen.protocol import FrozenLM
from lmcot.records import Choice, Completion, Failure, Prompt, Sampling, Score

Reply = TypeVar("Reply", Completion, Choice, Score)

_FORM = 1
"""Part of every key: raised when replies of an older form must not be read."""


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """Requests since the last look."""

    asked: int
    found: int


class CachedLM:
    """A `FrozenLM` that asks only what its cache does not hold.

    Kept are the replies that would come again: greedy or seeded ones, probabilities of options,
    scores. Failures are not kept, and sampling without a seed always asks.

    Args:
        whole_calls: a call's replies are kept and found together or not at all. For models whose
            arithmetic rounds by the company that a prompt is in: a run then gets the same replies
            from the cache as without it.
    """

    def __init__(self, lm: FrozenLM, cache: ReplyCache, *, whole_calls: bool) -> None:
        self._lm = lm
        self._cache = cache
        self._whole_calls = whole_calls
        self._asked = self._found = 0

    @property
    def identity(self) -> str:
        """Names the model and its arithmetic."""
        return self._lm.identity

    @property
    def parameters(self) -> int | None:
        """Number of parameters, if known."""
        return self._lm.parameters

    def counts(self) -> CacheCounts:
        """How many requests came since the last call of this, and how many the cache answered."""
        counts = CacheCounts(self._asked, self._found)
        self._asked = self._found = 0
        return counts

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt."""
        if sampling.temperature > 0 and sampling.seed is None:
            self._asked += len(prompts)
            return self._lm.generate(prompts, sampling)
        return self._through(
            Completion,
            [("generate", prompt, asdict(sampling)) for prompt in _plain(prompts)],
            lambda asked: self._lm.generate([prompts[index] for index in asked], sampling),
        )

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options for each prompt."""
        return self._through(
            Choice,
            [("choose", prompt, list(options)) for prompt in _plain(prompts)],
            lambda asked: self._lm.choose([prompts[index] for index in asked], options),
        )

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation."""
        return self._through(
            Score,
            list(zip(["score"] * len(prompts), _plain(prompts), continuations, strict=True)),
            lambda asked: self._lm.score(
                [prompts[index] for index in asked], [continuations[index] for index in asked]
            ),
        )

    def _through(
        self,
        kind: type[Reply],
        requests: Sequence[Any],
        ask: Callable[[Sequence[int]], list[Reply | Failure]],
    ) -> list[Reply | Failure]:
        """The replies, from the cache or by asking for those of some requests."""
        keys = self._keys(requests)
        results: list[Reply | Failure | None] = [
            None if text is None else kind(**json.loads(text)) for text in self._cache.get(keys)
        ]
        missing = [index for index, result in enumerate(results) if result is None]
        if missing and self._whole_calls:
            missing = list(range(len(requests)))
        # The same request twice in one call is asked once.
        first = {keys[index]: index for index in reversed(missing)}
        asked = sorted(first.values())
        self._asked += len(requests)
        self._found += len(requests) - len(missing)
        replies = dict(zip(asked, ask(asked), strict=True)) if asked else {}
        self._cache.put(
            self.identity,
            [
                (keys[index], json.dumps(asdict(reply), allow_nan=False))
                for index, reply in replies.items()
                if not isinstance(reply, Failure)
            ],
        )
        for index in missing:
            results[index] = replies[first[keys[index]]]
        return [result for result in results if result is not None]

    def _keys(self, requests: Sequence[Any]) -> list[bytes]:
        start = hashlib.sha256(_canonical([_FORM, self.identity]))
        texts = [_canonical(request) for request in requests]
        if self._whole_calls:
            # Its place is part of a request then, so no two are the same.
            for text in texts:
                start.update(hashlib.sha256(text).digest())
            texts = [str(place).encode() for place in range(len(texts))]
        keys = []
        for text in texts:
            digest = start.copy()
            digest.update(hashlib.sha256(text).digest())
            keys.append(digest.digest())
        return keys


def _plain(prompts: Sequence[Prompt]) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.content) for message in prompt] for prompt in prompts]


def _canonical(request: Any) -> bytes:
    return json.dumps(request, sort_keys=True, ensure_ascii=True).encode()
