"""A frozen LM behind its cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lmcot.data.render import render_plain
from lmcot.frozen.backend import FrozenBackend
from lmcot.frozen.cache import ReplyCache
from lmcot.records import Choice, Completion, Failure, Message, Prompt, Sampling, Score, Usage

Method = Literal["generate", "choose", "score"]
Reply = Completion | Choice | Score | Failure
_KINDS: dict[Method, type[Completion] | type[Choice] | type[Score]] = {
    "generate": Completion,
    "choose": Choice,
    "score": Score,
}

_FORM = 2
"""Part of every key: raised when replies of an older form must not be read."""
_PROBE = (Message("system", "s"), Message("user", "u:"), Message("assistant", "a"))
"""Its rendering is part of every key, since replies depend on how prompts are rendered. Chat
templates are part of a local model's identity."""


@dataclass(frozen=True, slots=True)
class Replies:
    """The results of a call, and what it cost."""

    results: list[Any]
    """One result for each request; a `Failure` in place of what failed."""
    usage: Usage
    seconds: float = 0.0
    """Seconds that the call took, if it was timed."""


class CachedLM:
    """A `FrozenLM` that asks only what its cache does not hold, and tells what each call took.

    It caches the replies that would be the same again: greedy or seeded ones, probabilities of
    options, scores. It never caches failures, nor samples without a seed.

    It may be called from as many threads at once as the model behind it.

    Args:
        cache: None: every request is asked.
        whole_calls: a call's replies are cached and found together or not at all. For models whose
            rounding depends on the other prompts of a call: a run then gets the same replies from
            the cache as without it.
    """

    def __init__(self, lm: FrozenBackend, cache: ReplyCache | None, *, whole_calls: bool) -> None:
        self._lm = lm
        self._cache = cache
        self._whole_calls = whole_calls

    @property
    def identity(self) -> str:
        """Names the model and its arithmetic."""
        return self._lm.identity

    @property
    def parameters(self) -> int | None:
        """Number of parameters, if known."""
        return self._lm.parameters

    @property
    def notice(self) -> str:
        """What the user should know of how the model works; empty: nothing."""
        return self._lm.notice

    def check_alive(self) -> None:
        """Checks that the model can be asked; an endpoint is not asked.

        Raises:
            RuntimeError: if it has ended.
        """
        self._lm.check_alive()

    def close(self) -> None:
        """Ends the model's threads and connections, and the cache's; it is not asked again."""
        self._lm.close()
        if self._cache is not None:
            self._cache.close()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt."""
        return self.replies("generate", prompts, sampling).results

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options for each prompt."""
        return self.replies("choose", prompts, options).results

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation."""
        return self.replies("score", prompts, continuations).results

    def replies(self, method: Method, prompts: Sequence[Prompt], argument: Any) -> Replies:
        """One of the three calls, with what it took.

        Args:
            argument: the call's second one: sampling, options or continuations.
        """
        each = argument if method == "score" else [argument] * len(prompts)

        def ask(places: Sequence[int]) -> list[Reply]:
            rest = [argument[place] for place in places] if method == "score" else argument
            asked: list[Reply] = getattr(self._lm, method)([prompts[i] for i in places], rest)
            return asked

        differs = method == "generate" and not self._lm.repeats(argument)
        if self._cache is None or differs:
            results = ask(range(len(prompts))) if prompts else []
            return Replies(results, _usage(len(prompts), results))
        requests = [
            (method, _plain(prompt), asdict(one) if isinstance(one, Sampling) else one)
            for prompt, one in zip(prompts, each, strict=True)
        ]
        return self._through(self._cache, _KINDS[method], requests, ask)

    def _through(
        self,
        cache: ReplyCache,
        kind: type[Completion] | type[Choice] | type[Score],
        requests: Sequence[Any],
        ask: Callable[[Sequence[int]], list[Reply]],
    ) -> Replies:
        """The replies, from the cache or by asking for those of some requests."""
        keys = self._keys(requests)
        results: list[Reply | None] = [
            None if text is None else kind(**json.loads(text)) for text in cache.get(keys)
        ]
        missing = [index for index, result in enumerate(results) if result is None]
        if missing and self._whole_calls:
            missing = list(range(len(requests)))
        # The same request twice in one call is asked once.
        first = {keys[index]: index for index in reversed(missing)}
        asked = sorted(first.values())
        replies = dict(zip(asked, ask(asked), strict=True)) if asked else {}
        cache.put(
            self.identity,
            [
                (keys[index], json.dumps(asdict(reply), allow_nan=False))
                for index, reply in replies.items()
                if not isinstance(reply, Failure)
            ],
        )
        for index in missing:
            results[index] = replies[first[keys[index]]]
        return Replies(list(results), _usage(len(requests), list(replies.values())))

    def _keys(self, requests: Sequence[Any]) -> list[bytes]:
        start = hashlib.sha256(_canonical([_FORM, render_plain(_PROBE), self.identity]))
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


def _plain(prompt: Prompt) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in prompt]


def _usage(asked: int, sent: Sequence[Reply]) -> Usage:
    """Counts requests and tokens; the tokens of a failed request are not known."""
    tokens = sum(
        one.tokens_in + (0 if isinstance(one, Score) else one.tokens_out)
        for one in sent
        if not isinstance(one, Failure)
    )
    estimated = sum(not isinstance(one, Failure) and one.estimated for one in sent)
    return Usage(asked, len(sent), tokens, estimated)


def _canonical(request: Any) -> bytes:
    return json.dumps(request, sort_keys=True, ensure_ascii=True).encode()
