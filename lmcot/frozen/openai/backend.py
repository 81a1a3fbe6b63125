"""The frozen LM behind any OpenAI-compatible HTTP endpoint: a true black box."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

from lmcot.config import OpenAIFrozen, PromptSettings
from lmcot.data.render import parted, render_plain
from lmcot.frozen.backend import FrozenBackend
from lmcot.frozen.needs import Found, Needs
from lmcot.frozen.openai.access import open_access
from lmcot.frozen.openai.choices import to_choice
from lmcot.frozen.openai.client import EndpointClient
from lmcot.frozen.openai.errors import LONGEST_REASON, EndpointError
from lmcot.frozen.openai.form import RequestForm
from lmcot.frozen.openai.replies import Faulty, Reply, to_completion
from lmcot.frozen.openai.scores import to_score
from lmcot.records import Choice, Completion, Failure, FailureKind, Prompt, Sampling, Score, Usage
from lmcot.text.visible import PLAIN_STOP

CHOICE_TOKENS = 16
"""Tokens for an option and the words around it, where it is read from the text; some endpoints
accept no fewer."""
_MOST_ALTERNATIVES = (20, 5, 0)
"""Numbers of alternatives per token that are asked for, one after the other."""
_NO_SCORES = "a chat endpoint offers no log-likelihoods of a given text"
REFUSED = (400, 422)

Result = TypeVar("Result")


class OpenAILM(FrozenBackend):
    """A `FrozenLM` that asks an endpoint; any number of threads may call it at once.

    They share the settings' bounds: requests in flight, requests and tokens per minute. Transient
    failures (time-outs, lost connections, bodies that are no completions, 408, 409, 425, 429, 5xx)
    are tried again with growing pauses or as the endpoint's Retry-After says, and so are replies
    without text or with impossible numbers. What still fails is returned: a transient `Failure`
    for the former, a permanent one for all else.

    Raises:
        UserError: if the address is none, or there is no key for an endpoint elsewhere.
    """

    def __init__(self, settings: OpenAIFrozen) -> None:
        self._settings = settings
        self.client = EndpointClient(settings, open_access(settings))
        self._alternatives: int | None = None
        """How many alternatives the endpoint accepts, once it has given some."""

    @classmethod
    def open(cls, settings: OpenAIFrozen, prompts: PromptSettings) -> Self:
        """A client of the endpoint, which sends nothing yet.

        Raises:
            UserError: as the constructor does.
        """
        return cls(settings)

    @classmethod
    def check(cls, settings: OpenAIFrozen, needs: Needs, spend: Callable[[Usage], None]) -> Found:
        """Asks the endpoint one request of each form that the run will send.

        Raises:
            UserError: if it does not answer; names the setting to correct.
        """
        from lmcot.frozen.openai.check import check_endpoint

        return check_endpoint(settings, needs, spend)

    @property
    def identity(self) -> str:
        """Names the endpoint, the model, the API unless it is chat, and what alters replies."""
        api = "" if self._settings.api == "chat" else f":{self._settings.api}"
        altered = RequestForm.of(self._settings).digest_of()
        form = f":{hashlib.sha256(altered.encode()).hexdigest()[:8]}" if altered else ""
        return f"openai:{self._settings.base_url}:{self._settings.model}{api}{form}"

    @property
    def parameters(self) -> int | None:
        """Number of parameters, if the settings say it."""
        return self._settings.parameters

    def repeats(self, sampling: Sampling) -> bool:
        """Whether the same prompt gets the same reply again."""
        return self.client.form.repeats(sampling.temperature, sampling.seed)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt; tokens that the endpoint does not count are estimated."""

        stop = self.stop(sampling)

        def judge(reply: Reply) -> Completion:
            return to_completion(reply, stop)

        async def ask(prompt: Prompt) -> Completion | Failure:
            found = None
            if stop and "stop" not in self.client.form.dropped:
                with_stop = self.completion_body(prompt, sampling)
                found = await self.client.ask(with_stop, lambda reply: _or_none(judge, reply))
            if found is None or (not found.text and found.finish_reason == "stop"):
                # The endpoint may have stopped within the thinking, or before the first word.
                plain = self.completion_body(prompt, replace(sampling, stop=()))
                found = await self.client.ask(plain, judge)
            return found

        return self.client.each(ask, prompts)

    def stop(self, sampling: Sampling) -> tuple[str, ...]:
        """The strings that end a reply."""
        if sampling.stop is not None:
            return sampling.stop
        return () if self._settings.api == "chat" else PLAIN_STOP

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options from the first word's alternatives, in any letter case.

        Where the endpoint gives no log-probabilities, or none of an option, the option that the
        reply names gets probability 1.
        """

        async def ask(prompt: Prompt) -> Choice | Failure:
            return await self.ask_choice(prompt, lambda reply: to_choice(reply, options))

        return self.client.each(ask, prompts)

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation, where the endpoint echoes text with log-likelihoods.

        Where no white space separates it from the prompt, a space is added. Chat endpoints score no
        given text: a permanent `Failure` for each.
        """
        pairs = list(zip(prompts, continuations, strict=True))
        if self._settings.api == "chat":
            return [Failure(FailureKind.PERMANENT, _NO_SCORES) for _ in pairs]
        return self.client.each(self._ask_for_score, pairs)

    def close(self) -> None:
        """Cancels what is in flight and closes the connections; it is not asked again."""
        self.client.close()

    def completion_body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """The request for a completion."""
        request: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.seed is not None:
            request["seed"] = sampling.seed
        if stop := self.stop(sampling):
            request["stop"] = list(stop)
        return self._body(prompt, request)

    async def ask_choice(self, prompt: Prompt, judge: Callable[[Reply], Result]) -> Result:
        """Asks for a choice, with as many alternatives of each token as the endpoint accepts.

        A refusal may concern something else in the request. If a smaller number is accepted, the
        number was the reason, and no more alternatives are asked for from then on.

        Raises:
            EndpointError: if the endpoint refuses each way.
        """
        room = CHOICE_TOKENS + self._settings.max_thinking_tokens
        plain = self._body(prompt, {"max_tokens": room, "temperature": 0.0})
        if self._alternatives is not None:
            return await self.client.ask(plain | self._asking_for(self._alternatives), judge)
        number = _MOST_ALTERNATIVES[0]
        while True:
            try:
                result = await self.client.ask(plain | self._asking_for(number), judge)
            except EndpointError as error:
                if not number or not (error.status in REFUSED or "logprobs" in error.said):
                    raise
                number = _fewer(number, error.said)
            else:
                self._alternatives = number
                return result

    def _asking_for(self, alternatives: int) -> dict[str, Any]:
        if not alternatives:
            return {}
        if self._settings.api == "chat":
            return {"logprobs": True, "top_logprobs": alternatives}
        return {"logprobs": alternatives}

    def _body(self, prompt: Prompt, request: dict[str, Any]) -> dict[str, Any]:
        said: dict[str, Any] = (
            {"messages": [{"role": turn.role, "content": turn.content} for turn in prompt]}
            if self._settings.api == "chat"
            else {"prompt": render_plain(prompt)}
        )
        return {"model": self._settings.model, **said, **request}

    async def _ask_for_score(self, pair: tuple[Prompt, str]) -> Score | Failure:
        before = render_plain(pair[0])
        whole = before + parted(before, pair[1])
        try:
            return await self.client.ask(
                self.echo_body(whole), lambda reply: to_score(reply, len(before), whole)
            )
        except EndpointError as error:
            if error.status not in REFUSED:
                raise
            reason = f"the endpoint refuses to score a given text: {error.failure.reason}"
            return Failure(FailureKind.PERMANENT, reason[:LONGEST_REASON])

    def echo_body(self, text: str, *, echo: bool = True) -> dict[str, Any]:
        """The request for a text's log-likelihoods, or only for that of the next token.

        It asks for one new token: none means 'no limit' to some servers, and others refuse it.
        """
        request = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1}
        if echo:
            request["echo"] = True
        return {"model": self._settings.model, "prompt": text, **request}


def _or_none(judge: Callable[[Reply], Completion], reply: Reply) -> Completion | None:
    """None for a reply without text, which a stop string may have cut short."""
    try:
        return judge(reply)
    except Faulty as error:
        if not error.again:
            raise
        return None


def _fewer(number: int, said: str) -> int:
    """The next number of alternatives to ask for, as a refusal names it or as is common."""
    named = [int(one) for one in re.findall(r"(?<![\w.])\d{1,3}(?![\w.]*\w)", said)]
    admitted = [one for one in named if 0 < one < number]
    common = next(one for one in _MOST_ALTERNATIVES if one < number)
    return max([*admitted, common]) if "logprobs" in said else common
