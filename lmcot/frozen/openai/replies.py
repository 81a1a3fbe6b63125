"""How replies of an OpenAI-compatible endpoint are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from lmcot.records import Completion
from lmcot.text.visible import NOT_SHOWN, visible_reply

Api = Literal["chat", "completions"]

Item = TypeVar("Item")
# Endpoints write null for what they do not give.
_Listed = Annotated[list[Item], BeforeValidator(lambda given: [] if given is None else given)]
_THINKING_PARTS = ("thinking", "reasoning", "redacted_thinking", "reasoning_content")
_EXCERPT = 120
"""Characters of an invalid body that its failure quotes."""


class Garbled(Exception):
    """The body is not a completion: the endpoint, or a proxy in front of it, is faulty."""


class ErrorBody(Exception):
    """An error under the status of a success.

    Attributes:
        status: what the error itself gives as its status of HTTP; 200 if it gives none.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Faulty(Exception):
    """The completion holds what no model gives: no text, or numbers that are no log-likelihoods.

    Attributes:
        again: whether it is worth another try; not where the reply explains itself.
    """

    def __init__(self, reason: str, *, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


def _count(given: Any) -> int:
    """A count of tokens; 0 where the endpoint gives none."""
    try:
        return max(0, int(given))
    except (TypeError, ValueError, OverflowError):
        return 0


_Count = Annotated[int, BeforeValidator(_count)]


class _Usage(BaseModel):
    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0
    completion_tokens_details: Any = None

    def thinking_tokens(self) -> int | None:
        """Tokens of hidden thinking, where the endpoint counts them separately."""
        details = self.completion_tokens_details
        found = details.get("reasoning_tokens") if isinstance(details, dict) else None
        return found if isinstance(found, int) else None


class _Alternative(BaseModel):
    token: str
    logprob: float | None


class _Token(BaseModel):
    token: str = ""
    logprob: float | None = None
    top_logprobs: _Listed[_Alternative] = []


class Tokens(BaseModel):
    """The tokens of a completion with their log-probabilities, in either API's form.

    Servers mix them: some give the chat form for text completions.
    """

    content: _Listed[_Token] = []
    """Tokens in the form of the chat API."""
    tokens: _Listed[str] = []
    """Tokens in the form of the completions API, as are the fields below."""
    token_logprobs: _Listed[float | None] = []
    text_offset: _Listed[int] = []
    """Where each token begins, in characters of the reply's text."""
    top_logprobs: _Listed[dict[str, float | None] | None] = []

    def alternatives(self) -> Iterator[tuple[str, list[tuple[str, float | None]]]]:
        """Each token that was generated, with its alternatives and their log-probabilities."""
        if self.content:
            for one in self.content:
                yield one.token, [(top.token, top.logprob) for top in one.top_logprobs]
            return
        for place, top in enumerate(self.top_logprobs):
            found = list((top or {}).items())
            token = self.tokens[place] if place < len(self.tokens) else ""
            yield token, found


class _Message(BaseModel):
    content: str | list[Any] | None = None
    """A text, or parts of a text and of thinking."""
    reasoning_content: Any = None
    """Hidden thinking, as vLLM, SGLang, llama.cpp and DeepSeek call it."""
    reasoning: Any = None
    """Hidden thinking, as OpenRouter, Groq and newer vLLM call it."""
    thinking: Any = None
    """Hidden thinking, as Ollama calls it."""
    refusal: Any = None
    tool_calls: Any = None

    def parts(self) -> tuple[str, str]:
        """The text, and the hidden thinking."""
        apart = self.reasoning_content or self.reasoning or self.thinking
        if not isinstance(self.content, list):
            return self.content or "", _words(apart)
        hidden = [one for one in self.content if _is_thinking(one)]
        shown = [one for one in self.content if not _is_thinking(one)]
        return _words(shown), _words(apart or hidden)

    def withheld(self) -> str:
        """Why there is no text, where the message says so."""
        if self.refusal:
            return f"the model refused, saying: {self.refusal}"
        if self.tool_calls:
            return (
                "the model called a tool (tool_calls), though lmcot offers it none; switch the "
                "endpoint's own tools off"
            )
        return ""


def _is_thinking(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("type")) in _THINKING_PARTS


def _words(content: Any) -> str:
    """The text of a string, a part, or a list of these."""
    if isinstance(content, list):
        return "".join(map(_words, content))
    if isinstance(content, dict):
        return _words(content.get("text") or content.get("thinking") or content.get("content"))
    return content if isinstance(content, str) else ""


class _ChatChoice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: Tokens | None = None
    error: Any = None


class _ChatBody(BaseModel):
    choices: list[_ChatChoice] = Field(min_length=1)
    usage: Any = None


class _TextChoice(BaseModel):
    text: str
    finish_reason: str | None = None
    logprobs: Tokens | None = None
    error: Any = None


class _TextBody(BaseModel):
    choices: list[_TextChoice] = Field(min_length=1)
    usage: Any = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The content of a reply of either API."""

    text: str
    cut: bool
    """Whether the model was stopped at its limit of tokens."""
    tokens_in: int
    """The endpoint's count; 0 if it gives none. Likewise ``tokens_out``."""
    tokens_out: int
    thinking: str = ""
    """Hidden thinking that the endpoint gives in a field of its own."""
    withheld: str = ""
    """Why there is no answer, where the endpoint says so."""
    tokens: Tokens | None = None
    estimated: bool = False
    """Whether a count of tokens is an estimate, since the endpoint gives none."""
    thinking_tokens: int | None = None
    """How many of ``tokens_out`` are hidden thinking; None where the endpoint does not say."""


def read(body: str, api: Api) -> Reply:
    """The reply in a body.

    Raises:
        Garbled: if it is not JSON, or no completion of this API.
        ErrorBody: if it is an error.
    """
    try:
        found = json.loads(body.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        raise Garbled(_not_a_completion("body: not JSON", body)) from None
    if isinstance(found, dict) and found.get("error") and not found.get("choices"):
        raise _error_in(found["error"])
    try:
        return _read_chat(found) if api == "chat" else _read_text(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Garbled(_not_a_completion(f"{where}: {first['msg']}", body)) from None


def _not_a_completion(problem: str, body: str) -> str:
    start = " ".join(body[: 4 * _EXCERPT].split())[:_EXCERPT]
    begins = f"; it begins: {start}" if start else ""
    return f"the endpoint's reply is not a completion ({problem}{begins})"


def _error_in(error: Any) -> ErrorBody:
    code = error.get("code") if isinstance(error, Mapping) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 200
    return ErrorBody(f"the endpoint answers with an error: {said(error)}", status)


def said(error: Any) -> str:
    """The message of an error's body, with that of the provider behind the endpoint."""
    if not isinstance(error, Mapping):
        return str(error)
    message = error.get("message") or error.get("detail") or dict(error)
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return f"{message} ({raw})" if raw else str(message)


def _read_chat(body: Any) -> Reply:
    found = _ChatBody.model_validate(body)
    choice = found.choices[0]
    text, thinking = choice.message.parts()
    usage = _usage(found.usage)
    return Reply(
        text,
        choice.finish_reason == "length",
        usage.prompt_tokens,
        usage.completion_tokens,
        thinking=thinking,
        thinking_tokens=usage.thinking_tokens(),
        withheld=_withheld(choice, "" if text.strip() else choice.message.withheld()),
        tokens=choice.logprobs,
    )


def _read_text(body: Any) -> Reply:
    found = _TextBody.model_validate(body)
    choice = found.choices[0]
    usage = _usage(found.usage)
    return Reply(
        choice.text,
        choice.finish_reason == "length",
        usage.prompt_tokens,
        usage.completion_tokens,
        thinking_tokens=0,  # this API gives all that the model wrote
        withheld=_withheld(choice, ""),
        tokens=choice.logprobs,
    )


def _withheld(choice: _ChatChoice | _TextChoice, message: str) -> str:
    """Why there is no answer, as the reply itself says; empty if it does not."""
    if choice.error:
        return f"the endpoint's reply holds an error: {said(choice.error)}"
    if choice.finish_reason == "content_filter":
        return "the endpoint's content filter withheld the reply (finish_reason content_filter)"
    return f"the endpoint's reply holds no text: {message}" if message else ""


def _usage(usage: Any) -> _Usage:
    return _Usage.model_validate(usage if isinstance(usage, dict) else {})


def to_completion(reply: Reply, stop: Sequence[str]) -> Completion:
    """The visible reply, up to the first of the stop strings: not every endpoint honours them.

    It is empty where the endpoint gave nothing but hidden thinking, or was stopped at the limit
    before it came to a word.

    Raises:
        Faulty: if there is no text at all, and nothing says why; or the reply says why itself.
    """
    if reply.withheld:
        raise Faulty(reply.withheld, again=False)
    seen = visible_reply(reply.text, stop)
    thinking = "\n".join(one for one in (reply.thinking.strip(), seen.thinking) if one)
    if not reply.text and not thinking and reply.cut and reply.thinking_tokens != 0:
        thinking = NOT_SHOWN  # most likely: something took all of its tokens
    if not reply.text.strip() and not thinking and not reply.cut:
        raise Faulty("the endpoint's reply holds no text")
    finish: Literal["stop", "length"] = "length" if reply.cut and not seen.stopped else "stop"
    return Completion(
        seen.text, reply.tokens_in, reply.tokens_out, finish, thinking, reply.estimated
    )
