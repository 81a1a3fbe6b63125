"""The frozen LM behind any OpenAI-compatible HTTP endpoint: a true black box."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lmcot.config import OpenAIFrozen
from lmcot.data.render import parted, render_plain
from lmcot.errors import UserError
from lmcot.frozen.openai_client import LONGEST_REASON, EndpointClient, EndpointError
from lmcot.frozen.openai_replies import Faulty, Reply, to_choice, to_completion, to_score
from lmcot.frozen.visible import PLAIN_STOP
from lmcot.records import (
    Choice,
    Completion,
    Failure,
    FailureKind,
    Message,
    Prompt,
    Sampling,
    Score,
)

# Room for an option and what models put around it, where it must be read from the text.
_CHOICE_TOKENS = 8
# The most that each API admits.
_TOP_LOGPROBS = {
    "chat": {"logprobs": True, "top_logprobs": 20},
    "completions": {"logprobs": 5},
}
_NO_SCORES = "a chat endpoint offers no log-likelihoods of a given text"
_REFUSED = (400, 422)
_CHECK_RETRIES = 2

Result = TypeVar("Result")


class OpenAILM:
    """A `FrozenLM` that asks an endpoint; any number of threads may call it at once.

    They share the settings' bounds: requests under way, requests and tokens per minute. Transient
    failures (time-outs, lost connections, bodies that are no completions, 408, 409, 425, 429, 5xx)
    are tried again with growing pauses or as the endpoint's Retry-After says, and so are replies
    without text or with impossible numbers. What still fails is returned: a transient `Failure`
    for the former, a permanent one for all else.

    Raises:
        UserError: if the address is none, or there is no key for an endpoint elsewhere.
    """

    def __init__(self, settings: OpenAIFrozen) -> None:
        self._settings = settings
        self._client = EndpointClient(settings, _api_key(settings))
        self._refused: set[str] = set()

    @property
    def identity(self) -> str:
        """Names the endpoint, the model, and the API unless it is chat."""
        api = "" if self._settings.api == "chat" else f":{self._settings.api}"
        return f"openai:{self._settings.base_url}:{self._settings.model}{api}"

    @property
    def parameters(self) -> int | None:
        """Number of parameters, if the settings tell."""
        return self._settings.parameters

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt; token counts are the endpoint's (0 if not given)."""
        stop = sampling.stop
        if stop is None:
            stop = () if self._settings.api == "chat" else PLAIN_STOP
        request = _request(sampling)

        async def ask(prompt: Prompt) -> Completion | Failure:
            def judge(reply: Reply) -> Completion:
                return to_completion(reply, stop)

            found = None
            if stop:
                with_stop = self._body(prompt, **request, stop=list(stop))
                found = await self._client.ask(with_stop, lambda reply: _or_none(judge, reply))
            if found is None or (not found.text and found.finish_reason == "stop"):
                # The endpoint may have stopped within the thinking, or before the first word.
                found = await self._client.ask(self._body(prompt, **request), judge)
            return found

        return self._client.each(ask, prompts)

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options from the first token's alternatives, in any letter case.

        Where the endpoint gives no log-probabilities, or none of an option, the option that the
        reply begins with gets probability 1.
        """
        top = _TOP_LOGPROBS[self._settings.api]

        async def ask(prompt: Prompt) -> Choice | Failure:
            body = self._body(prompt, max_tokens=_CHOICE_TOKENS, temperature=0.0)
            return await self._ask_either(
                "logprobs", body | top, body, lambda reply: to_choice(reply, options)
            )

        return self._client.each(ask, prompts)

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation, where the endpoint echoes text with log-likelihoods.

        A space parts it from the prompt where there is no white space. Chat endpoints score no
        given text: a permanent `Failure` for each.
        """
        pairs = list(zip(prompts, continuations, strict=True))
        if self._settings.api == "chat":
            return [Failure(FailureKind.PERMANENT, _NO_SCORES) for _ in pairs]
        return self._client.each(self._ask_for_score, pairs)

    def check(self) -> None:
        """Asks the endpoint one tiny request.

        Raises:
            UserError: if it is not answered; names the setting to mend.
        """
        retries = min(_CHECK_RETRIES, self._settings.max_retries)
        try:
            self._client.check(
                self._body((Message("user", "Hi"),), max_tokens=1), max_retries=retries
            )
        except EndpointError as error:
            raise UserError(_complaint(error, self._settings)) from None

    def close(self) -> None:
        """Gives up what is under way, and the connections; not to be asked again."""
        self._client.close()

    def _body(self, prompt: Prompt, **request: Any) -> dict[str, Any]:
        if self._settings.api == "chat":
            request["messages"] = [{"role": turn.role, "content": turn.content} for turn in prompt]
        else:
            request["prompt"] = render_plain(prompt)
        return {"model": self._settings.model, **request}

    async def _ask_for_score(self, pair: tuple[Prompt, str]) -> Score | Failure:
        before = render_plain(pair[0])
        whole = before + parted(before, pair[1])
        body = {
            "model": self._settings.model,
            "prompt": whole,
            "max_tokens": 0,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
        }
        try:
            return await self._ask_either(
                "max_tokens=0",
                body,
                body | {"max_tokens": 1},
                lambda reply: to_score(reply, len(before), whole),
            )
        except EndpointError as error:
            if error.status not in _REFUSED:
                raise
            reason = f"the endpoint refuses to score a given text: {error.failure.reason}"
            return Failure(FailureKind.PERMANENT, reason[:LONGEST_REASON])

    async def _ask_either(
        self,
        what: str,
        first: dict[str, Any],
        second: dict[str, Any],
        judge: Callable[[Reply], Result],
    ) -> Result:
        """Asks the first way, or the second if the endpoint refuses ``what`` sets the first apart.

        It may be for something else that it refuses: if it takes the second way, it was for that,
        and is not asked the first way again.
        """
        if what not in self._refused:
            try:
                return await self._client.ask(first, judge)
            except EndpointError as error:
                if error.status not in _REFUSED:
                    raise
        result = await self._client.ask(second, judge)
        self._refused.add(what)
        return result


def _complaint(error: EndpointError, settings: OpenAIFrozen) -> str:
    """What to tell the user, by the status that the endpoint answered a first request with."""
    endpoint, reason = f"the endpoint {settings.base_url}", error.failure.reason
    if error.status == 0:
        return f"{endpoint} cannot be reached ({reason}): start it, or mend frozen.base_url"
    if error.status == 200:
        return f"{endpoint} does not speak the OpenAI API ({reason}): mend frozen.base_url"
    if error.status in (401, 403):
        return (
            f"{endpoint} does not let us in ({reason}): put a valid key into the environment "
            f"variable {settings.api_key_env}, or name another in frozen.api_key_env"
        )
    if error.status == 404:
        return (
            f"{endpoint} knows no model '{settings.model}', or no {settings.api} API ({reason}): "
            "mend frozen.model, frozen.base_url or frozen.api"
        )
    return (
        f"{endpoint} does not answer a first request ({reason}): see the endpoint's own messages, "
        "and check frozen.base_url, frozen.model and frozen.api"
    )


def _api_key(settings: OpenAIFrozen) -> str:
    host = _host(settings.base_url)
    key = os.environ.get(settings.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"the environment variable {settings.api_key_env} holds no API key: it has characters "
            "that no key has, so set it anew"
        )
    if key:
        return key
    if _is_loopback(host):
        return "none-needed"
    raise UserError(
        f"the environment variable {settings.api_key_env} is not set: "
        f"put the API key of {host} into it"
    )


def _host(url: str) -> str:
    try:
        address = urlsplit(url)
        host, _ = address.hostname, address.port  # a port that is no number raises
    except ValueError:
        host = None
    if not host or address.scheme not in ("http", "https"):
        raise UserError(
            f"frozen.base_url is '{url}', which is not an http(s) address: "
            "give one like http://localhost:8000/v1"
        )
    if address.username or address.password:
        raise UserError(
            "frozen.base_url holds a user name or password, which reports would show: leave them "
            "out, and put an API key into the environment variable that frozen.api_key_env names"
        )
    return host


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
    return request


def _or_none(judge: Callable[[Reply], Completion], reply: Reply) -> Completion | None:
    """None for a reply without text, which a stop string may have cut short."""
    try:
        return judge(reply)
    except Faulty:
        return None
