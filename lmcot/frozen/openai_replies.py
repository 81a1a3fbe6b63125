"""Replies of an OpenAI-compatible endpoint, read and judged; nothing here asks for any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from lmcot.frozen.visible import visible_reply
from lmcot.records import Choice, Completion, Failure, FailureKind, Score

Api = Literal["chat", "completions"]

Item = TypeVar("Item")
# Endpoints write null for what they do not give.
_Listed = Annotated[list[Item], BeforeValidator(lambda given: [] if given is None else given)]

_THINKING_PARTS = ("thinking", "reasoning", "redacted_thinking", "reasoning_content")

_ROUNDING = 1e-4
"""Half-precision arithmetic may leave the log-probability of a sure token above 0 by so much."""


class Garbled(Exception):
    """The body is no completion: the endpoint, or something before it, is out of order."""


class Faulty(Exception):
    """The completion holds what no model gives: no text, or numbers that are no log-likelihoods."""


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Alternative(BaseModel):
    token: str
    logprob: float | None


class _ChatToken(BaseModel):
    top_logprobs: list[_Alternative] | None = None


class _ChatLogprobs(BaseModel):
    content: list[_ChatToken] | None = None


class _Message(BaseModel):
    content: str | list[Any] | None = None
    """A text, or parts of a text and of thinking."""
    reasoning_content: Any = None
    """Hidden thinking, as vLLM, SGLang, llama.cpp and DeepSeek call it."""
    reasoning: Any = None
    """Likewise, as OpenRouter, Groq and newer vLLM call it."""
    thinking: Any = None
    """Likewise, as Ollama calls it."""

    def parts(self) -> tuple[str, str]:
        """The text, and the hidden thinking."""
        apart = self.reasoning_content or self.reasoning or self.thinking
        if not isinstance(self.content, list):
            return self.content or "", _words(apart)
        hidden = [one for one in self.content if _is_thinking(one)]
        shown = [one for one in self.content if not _is_thinking(one)]
        return _words(shown), _words(apart or hidden)


def _is_thinking(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("type")) in _THINKING_PARTS


def _words(content: Any) -> str:
    """The text of what is a string, a part or a list of such."""
    if isinstance(content, list):
        return "".join(map(_words, content))
    if isinstance(content, dict):
        return _words(content.get("text") or content.get("thinking") or content.get("content"))
    return content if isinstance(content, str) else ""


class _ChatChoice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _ChatLogprobs | None = None


class _ChatBody(BaseModel):
    choices: list[_ChatChoice] = Field(min_length=1)
    usage: _Usage | None = None


class Tokens(BaseModel):
    """The tokens of a text completion, as the legacy API gives them."""

    tokens: _Listed[str] = []
    token_logprobs: _Listed[float | None] = []
    text_offset: _Listed[int] = []
    """Where each token begins, in characters of the reply's text."""
    top_logprobs: _Listed[dict[str, float | None] | None] = []

    def complete(self) -> bool:
        """Whether every token has its log-probability and its place."""
        return 0 < len(self.tokens) == len(self.token_logprobs) == len(self.text_offset)


class _TextChoice(BaseModel):
    text: str
    finish_reason: str | None = None
    logprobs: Tokens | None = None


class _TextBody(BaseModel):
    choices: list[_TextChoice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What is read of a reply, by whichever API it came."""

    text: str
    cut: bool
    """Whether the model was stopped at its limit of tokens."""
    tokens_in: int
    """The endpoint's count; 0 if it gives none. Likewise ``tokens_out``."""
    tokens_out: int
    first: tuple[tuple[str, float | None], ...] = ()
    """Alternatives for the first token, with their log-probabilities."""
    tokens: Tokens | None = None
    thinking: str = ""
    """Hidden thinking that the endpoint gives apart from the text."""


def read(body: str, api: Api) -> Reply:
    """The reply in a body.

    Raises:
        Garbled: if it is not JSON, or no completion of this API.
    """
    try:
        return _read_chat(body) if api == "chat" else _read_text(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Garbled(
            f"the endpoint's reply is not a completion ({where}: {first['msg']})"
        ) from None


def _read_chat(body: str) -> Reply:
    found = _ChatBody.model_validate_json(body)
    choice = found.choices[0]
    content = choice.logprobs.content if choice.logprobs else None
    alternatives = (content[0].top_logprobs if content else None) or []
    text, thinking = choice.message.parts()
    return Reply(
        text,
        choice.finish_reason == "length",
        *_counts(found.usage),
        first=tuple((one.token, one.logprob) for one in alternatives),
        thinking=thinking,
    )


def _read_text(body: str) -> Reply:
    found = _TextBody.model_validate_json(body)
    choice = found.choices[0]
    top = choice.logprobs.top_logprobs if choice.logprobs else []
    return Reply(
        choice.text,
        choice.finish_reason == "length",
        *_counts(found.usage),
        first=tuple(((top[0] if top else None) or {}).items()),
        tokens=choice.logprobs,
    )


def _counts(usage: _Usage | None) -> tuple[int, int]:
    """Tokens in and out."""
    return (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)


def to_completion(reply: Reply, stop: Sequence[str]) -> Completion:
    """The visible reply, up to the first of the stop strings: not every endpoint honours them.

    It is empty where the endpoint gave nothing but hidden thinking, or was stopped at the limit
    before it came to a word.

    Raises:
        Faulty: if there is no text at all, and nothing says why.
    """
    seen = visible_reply(reply.text, stop)
    thinking = "\n".join(one for one in (reply.thinking.strip(), seen.thinking) if one)
    if not reply.text.strip() and not thinking and not reply.cut:
        raise Faulty("the endpoint's reply holds no text")
    finish: Literal["stop", "length"] = "length" if reply.cut and not seen.stopped else "stop"
    return Completion(seen.text, reply.tokens_in, reply.tokens_out, finish, thinking)


def to_choice(reply: Reply, options: Sequence[str]) -> Choice | Failure:
    """Probabilities of the options: from the first token's alternatives, else from the text.

    Raises:
        Faulty: if there is neither, or the log-probabilities are none.
    """
    found = _from_alternatives(reply.first, options) or _from_text(reply.text, options)
    if found is not None:
        return Choice(found, reply.tokens_in, reply.tokens_out)
    reason = f"the endpoint's reply is none of {', '.join(options)}"
    if not reply.text.strip():
        raise Faulty(f"{reason}: it holds no text")
    return Failure(FailureKind.PERMANENT, reason)


def _from_alternatives(
    alternatives: Iterable[tuple[str, float | None]], options: Sequence[str]
) -> dict[str, float] | None:
    """The first token's probability mass by option, normalised; None if there is none."""
    mass = dict.fromkeys(options, 0.0)
    for token, logprob in alternatives:
        sound = _sound(logprob)
        option = _begun_by(token, options)
        if option is not None:
            mass[option] += math.exp(sound)
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


def to_score(reply: Reply, start: int, whole: str) -> Score | Failure:
    """Log-likelihood of a text from its character ``start`` on, as the endpoint echoed it.

    Raises:
        Faulty: if there is no text, or the log-probabilities are none.
    """
    if not reply.text:
        raise Faulty("the endpoint's reply holds no text")
    tokens = reply.tokens
    if tokens is None or not tokens.complete() or not reply.text.startswith(whole):
        return Failure(
            FailureKind.PERMANENT, "the endpoint gives no log-likelihoods of a given text"
        )
    counted = [
        (token, offset, logprob)
        for token, offset, logprob in zip(
            tokens.tokens, _echoed_at(tokens, whole), tokens.token_logprobs, strict=True
        )
        if start <= offset < len(whole)
    ]
    lost = not counted and start < len(whole)
    if lost or not all(_is_there(token, offset, whole) for token, offset, _ in counted):
        return Failure(
            FailureKind.PERMANENT, "the endpoint's token offsets do not fit the text that it echoes"
        )
    # Summed exactly: long continuations would lose digits.
    logprob = math.fsum(_sound(one) for _, _, one in counted)
    return Score(logprob, len(counted), reply.tokens_in)


def _echoed_at(tokens: Tokens, whole: str) -> list[int]:
    """Where each token begins in the echoed text.

    Some endpoints (vLLM) count the characters of the BOS token that they put first, though the
    text does not hold it.
    """
    first = tokens.tokens[0]
    counts_bos = not whole.startswith(first) and tokens.text_offset[1:2] == [len(first)]
    return [offset - len(first) * counts_bos for offset in tokens.text_offset]


def _is_there(token: str, offset: int, text: str) -> bool:
    """False if the token is elsewhere: some endpoints lose the spaces that tokens begin with.

    Not told of tokens that are parts of characters, which are written in many ways.
    """
    plain = token.isascii() and not token.startswith("bytes:")
    return not plain or text.startswith(token, offset)


def _sound(logprob: float | None) -> float:
    if logprob is None or not math.isfinite(logprob) or logprob > _ROUNDING:
        raise Faulty(f"the endpoint's reply holds a log-probability that is none: {logprob}")
    return logprob
