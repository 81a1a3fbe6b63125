"""The frozen LM behind any OpenAI-compatible HTTP endpoint: a true black box."""

from __future__ import annotations

import ipaddress
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion

from lmcot.config import OpenAIFrozen
from lmcot.errors import UserError
from lmcot.records import Choice, Completion, Failure, FailureKind, Prompt, Sampling, Score

# Room for an option and what models put around it, where it must be read from the text.
_CHOICE_TOKENS = 8
# The most that the API admits.
_TOP_LOGPROBS = 20
_TRANSIENT_STATUS = (408, 409, 429)

Result = TypeVar("Result", Completion, Choice)


class OpenAILM:
    """A `FrozenLM` that asks a chat endpoint; at most ``concurrency`` requests are under way.

    The client tries transient failures (time-outs, lost connections, 408, 409, 429, 5xx) again,
    with growing pauses or as long as the endpoint's Retry-After says; what still fails is
    returned as a transient `Failure`, everything else that goes wrong as a permanent one.

    Raises:
        UserError: if the address is none, or there is no key for an endpoint elsewhere.
    """

    def __init__(self, settings: OpenAIFrozen) -> None:
        self._settings = settings
        self._key = _api_key(settings)
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=self._key,
            timeout=settings.read_timeout_s,
            max_retries=settings.max_retries,
        )
        self._offers_logprobs = True

    @property
    def identity(self) -> str:
        """Names the endpoint and the model."""
        return f"openai:{self._settings.base_url}:{self._settings.model}"

    @property
    def parameters(self) -> int | None:
        """Number of parameters, if the settings tell."""
        return self._settings.parameters

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One chat completion for each prompt; token counts are the endpoint's (0 if not given)."""

        def one(prompt: Prompt) -> Completion | Failure:
            reply = self._ask(prompt, **_request(sampling))
            text = reply.choices[0].message.content or ""
            # Not every endpoint honours `stop`.
            ends = [text.index(end) for end in sampling.stop if end in text]
            text = text[: min(ends, default=len(text))]
            if not text.strip():
                return Failure(FailureKind.PERMANENT, "the endpoint's reply holds no text")
            cut = reply.choices[0].finish_reason == "length" and not ends
            return Completion(text, *_usage(reply), finish_reason="length" if cut else "stop")

        return self._each(one, prompts)

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options from the first token's alternatives, in any letter case.

        Where the endpoint gives no log-probabilities, or none of an option, the option that the
        reply begins with gets probability 1.
        """

        def one(prompt: Prompt) -> Choice | Failure:
            reply = self._ask_for_choice(prompt)
            text = reply.choices[0].message.content or ""
            found = _from_logprobs(reply, options) or _from_text(text, options)
            if found is None:
                return Failure(
                    FailureKind.PERMANENT, f"the endpoint's reply is none of {', '.join(options)}"
                )
            return Choice(found, *_usage(reply))

        return self._each(one, prompts)

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """A permanent `Failure` for each: chat endpoints score no given text."""
        reason = "an OpenAI-compatible endpoint offers no log-likelihoods of a given text"
        return [
            Failure(FailureKind.PERMANENT, reason) for _ in zip(prompts, continuations, strict=True)
        ]

    def _each(
        self, ask: Callable[[Prompt], Result | Failure], prompts: Sequence[Prompt]
    ) -> list[Result | Failure]:
        def guarded(prompt: Prompt) -> Result | Failure:
            try:
                return ask(prompt)
            except openai.OpenAIError as error:
                return self._failure(error)

        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            return list(pool.map(guarded, prompts))

    def _ask(self, prompt: Prompt, **request: Any) -> ChatCompletion:
        """One request.

        Raises:
            openai.OpenAIError: if it fails, or the reply is no chat completion.
        """
        messages: Any = [{"role": turn.role, "content": turn.content} for turn in prompt]
        try:
            reply = self._client.chat.completions.create(
                model=self._settings.model, messages=messages, **request
            )
        except json.JSONDecodeError as error:  # the body calls itself JSON and is not
            raise openai.OpenAIError(f"the endpoint's reply is not valid JSON: {error}") from None
        # The client builds its types without checking them.
        if not isinstance(reply, ChatCompletion) or not _is_well_formed(reply):
            raise openai.OpenAIError("the endpoint's reply is not a chat completion")
        return reply

    def _ask_for_choice(self, prompt: Prompt) -> ChatCompletion:
        request = {"max_tokens": _CHOICE_TOKENS, "temperature": 0.0}
        if self._offers_logprobs:
            try:
                return self._ask(prompt, logprobs=True, top_logprobs=_TOP_LOGPROBS, **request)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                # It may be the log-probabilities that it refuses: if it does without, it was.
                reply = self._ask(prompt, **request)
                self._offers_logprobs = False
                return reply
        return self._ask(prompt, **request)

    def _failure(self, error: openai.OpenAIError) -> Failure:
        kind = FailureKind.PERMANENT
        if isinstance(error, openai.APIConnectionError):  # time-outs too
            kind = FailureKind.TRANSIENT
        elif isinstance(error, openai.APIStatusError):
            again = error.status_code in _TRANSIENT_STATUS or error.status_code >= 500
            kind = FailureKind.TRANSIENT if again else FailureKind.PERMANENT
        # Some endpoints repeat the key in their refusal.
        reason = f"{type(error).__name__}: {error}".replace(self._key, "***")
        return Failure(kind, " ".join(reason.split())[:300])


def _api_key(settings: OpenAIFrozen) -> str:
    address = urlsplit(settings.base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(
            f"frozen.base_url is '{settings.base_url}', which is not an http(s) address: "
            "give one like http://localhost:8000/v1"
        )
    key = os.environ.get(settings.api_key_env)
    if key:
        return key
    if _is_loopback(address.hostname):
        return "none-needed"
    raise UserError(
        f"the environment variable {settings.api_key_env} is not set: "
        f"put the API key of {address.hostname} into it"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _request(sampling: Sampling) -> dict[str, Any]:
    request: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.seed is not None:
        request["seed"] = sampling.seed
    if sampling.stop:
        request["stop"] = list(sampling.stop)
    return request


def _is_well_formed(reply: ChatCompletion) -> bool:
    choices = reply.choices
    if not isinstance(choices, list) or not choices:
        return False
    content = getattr(getattr(choices[0], "message", None), "content", 0)
    return content is None or isinstance(content, str)


def _usage(reply: ChatCompletion) -> tuple[int, int]:
    """Tokens in and out."""
    if reply.usage is None:
        return 0, 0
    return reply.usage.prompt_tokens or 0, reply.usage.completion_tokens or 0


def _from_logprobs(reply: ChatCompletion, options: Sequence[str]) -> dict[str, float] | None:
    """The first token's probability mass by option, normalised; None if there is none."""
    logprobs = reply.choices[0].logprobs
    if logprobs is None or not logprobs.content:
        return None
    mass = dict.fromkeys(options, 0.0)
    for alternative in logprobs.content[0].top_logprobs or []:
        option = _begun_by(alternative.token, options)
        if option is not None:
            mass[option] += math.exp(alternative.logprob)
    total = math.fsum(mass.values())
    return {option: share / total for option, share in mass.items()} if total > 0 else None


def _begun_by(token: str, options: Iterable[str]) -> str | None:
    """The one option that the token is the beginning of, if there is just one."""
    start = token.strip().lower()
    begun = [option for option in options if start and option.lower().startswith(start)]
    return begun[0] if len(begun) == 1 else None


def _from_text(text: str, options: Sequence[str]) -> dict[str, float] | None:
    """Probability 1 for the option that the text begins with, if there is just one."""
    words = " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
    begun = [option for option in options if f"{words} ".startswith(f"{option.lower()} ")]
    if len(begun) != 1:
        return None
    return {option: float(option == begun[0]) for option in options}
