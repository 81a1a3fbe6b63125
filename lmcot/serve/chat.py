"""OpenAI's chat completions: OpenAI's clients get guided answers by another base URL."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from lmcot.answering.admission import COLDEST, Admission
from lmcot.answering.exchange import Piece, Wish, Written
from lmcot.answering.guidance import Ask
from lmcot.answering.refused import Refused
from lmcot.answering.schemas import AnswerResponse, Drawing
from lmcot.answering.structured import Form, form_in, read_form
from lmcot.config import Config
from lmcot.data.passages import text_blocks
from lmcot.serve.conversation import Asked, read_conversation
from lmcot.serve.dspy_form import FieldsWanted
from lmcot.serve.openai_schemas import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    ChosenTool,
    FinishReason,
    ToolCall,
    Usage,
)

_REFUSED: tuple[tuple[str, Callable[[ChatRequest], bool], str], ...] = (
    ("n", lambda one: one.n > 1, "there is one answer: leave n out, or set it to 1"),
    ("logprobs", lambda one: one.logprobs, "there are no log-probabilities of an answer"),
    ("top_logprobs", lambda one: one.top_logprobs > 0, "there are no log-probabilities"),
    ("logit_bias", lambda one: bool(one.logit_bias), "tokens cannot be preferred"),
    ("presence_penalty", lambda one: one.presence_penalty != 0, "there are no penalties"),
    ("frequency_penalty", lambda one: one.frequency_penalty != 0, "there are no penalties"),
    (
        "top_p",
        lambda one: one.top_p < 1 and (one.temperature or 0) > 0,
        "rationales are sampled from the whole distribution: leave top_p out, or set it to 1",
    ),
    (
        "functions",
        lambda one: bool(one.functions) and one.function_call != "none",
        "use tools instead",
    ),
    ("function_call", lambda one: one.function_call not in ("none", "auto"), "use tools instead"),
    ("modalities", lambda one: one.modalities not in ([], ["text"]), "an answer is text"),
    ("audio", lambda one: bool(one.audio), "an answer is text"),
    (
        "web_search_options",
        lambda one: one.web_search_options is not None,
        "there is no search: put what the answer needs into the context",
    ),
)
"""Fields that are refused because they would change the answer: name, condition, reason."""
_PLAIN_FIRST = "First give the short answer alone, in plain words: it is put into its form later."
"""Instruction to the frozen LM where the client's own may describe the form."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat completion's question, and the form of its reply."""

    asked: Asked
    wish: Wish
    form: Form | None
    tool: str | None
    """The function whose arguments hold the answer."""
    fields: FieldsWanted | None
    """Fields that the reply is written in, if not as JSON."""
    stop: tuple[str, ...]
    model: str
    usage: bool
    """Whether a stream reports the numbers of tokens."""


def read_chat(request: ChatRequest, model: str) -> Chat:
    """Reads a request.

    Args:
        model: name of the model, if the request names none.

    Raises:
        Refused: naming the field that is wrong, or not offered.
    """
    for name, refused, reason in _REFUSED:
        if refused(request):
            raise Refused(f"{name} is not offered: {reason}", param=name)
    asked = read_conversation(request.messages)
    form, tool = _form(request, asked)
    fields = asked.fields if form is None else None
    if fields is not None:
        form = _read(fields.schema, "messages")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if form is not None and any(stop):
        raise Refused("stop cannot cut a JSON object: leave one of them out", param="stop")
    longest = [one for one in (request.max_completion_tokens, request.max_tokens) if one]
    instructions = [*asked.instructions]
    if instructions and form is not None:
        instructions.append(_PLAIN_FIRST)
    return Chat(
        asked,
        Wish("\n\n".join(instructions), min(longest, default=None)),
        form,
        tool,
        fields,
        tuple(one for one in stop if one),
        request.model or model,
        request.stream_options.include_usage,
    )


class ChatAdmission:
    """Admits chat completions within the limits of the settings."""

    def __init__(self, config: Config, admission: Admission) -> None:
        self._settings = config.serve
        self._admission = admission

    def chat(self, request: ChatRequest, ident: str, *, spent: float = 0.0) -> tuple[Chat, Ask]:
        """What a request asks, and the form of its reply.

        Args:
            spent: seconds of the deadline that are over.

        Raises:
            Refused: naming the field that is beyond the limits, or not offered.
        """
        chat = read_chat(request, self._settings.name)
        asked, most = chat.asked, self._settings.limits.instruction_chars
        blocks = [(title, one) for title, text in asked.context for one in text_blocks(text)]
        context = self._admission.context(asked.question, blocks)
        instruction = len(chat.wish.instruction)
        if instruction > most:
            reason = f"the system messages have {instruction} characters, more than {most}"
            raise Refused(reason, param="messages")
        # The tokens of several rationales would come in a mixture.
        draw = self._admission.draw(
            _drawing(request),
            tokens=request.stream and request.samples == 1,
            spent=spent,
            length_name="max_rationale_tokens",
        )
        task = self._admission.task
        return chat, Ask(
            ident, asked.question, context, draw, wish=chat.wish, form=chat.form, task=task,
            advises=self._admission.advises,
        )  # fmt: skip


def _drawing(request: ChatRequest) -> Drawing:
    temperature = request.temperature
    if temperature is not None and temperature < COLDEST:
        temperature = 0.0  # clients that want greedy answers send tiny temperatures
    return Drawing(
        samples=request.samples,
        max_tokens=request.max_rationale_tokens,
        temperature=temperature,
        seed=abs(request.seed) % 2**63 if request.seed is not None else None,
    )


def _form(request: ChatRequest, asked: Asked) -> tuple[Form | None, str | None]:
    """The JSON object that holds the answer, and the tool that it is for."""
    tool = _forced_tool(request)
    if tool is not None:
        number = next(n for n, one in enumerate(request.tools) if one.function.name == tool)
        schema = request.tools[number].function.parameters
        return _read(schema, f"tools.{number}.function.parameters"), tool
    wanted = request.response_format
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise Refused(
                "response_format of type json_schema holds no json_schema",
                param="response_format.json_schema",
            )
        return _read(wanted.json_schema.schema_, "response_format.json_schema.schema"), None
    if wanted.type == "json_object":
        shown = form_in("\n".join((*asked.instructions, asked.question)))
        return shown or Form({"type": "object"}, open=True), None
    return None, None


def _forced_tool(request: ChatRequest) -> str | None:
    choice = request.tool_choice
    names = [one.function.name for one in request.tools]
    if choice == "none" or (choice == "auto" and not names):
        return None
    if choice == "auto":
        raise Refused(
            "tools: the models do not choose among tools: name one in tool_choice, or set "
            "tool_choice to none",
            param="tools",
        )
    if isinstance(choice, ChosenTool):
        if choice.function.name in names:
            return choice.function.name
        raise Refused("tool_choice names a tool that is not in tools", param="tool_choice")
    if len(names) == 1:
        return names[0]
    raise Refused(
        f"tool_choice is required, but there are {len(names)} tools: name one",
        param="tool_choice" if not names else "tools",
    )


def _read(schema: dict[str, Any], param: str) -> Form:
    try:
        return read_form(schema)
    except ValueError as error:
        raise Refused(str(error), param=param) from None


def chat_completion(found: AnswerResponse, chat: Chat) -> dict[str, Any]:
    """The answer in OpenAI's form; the rationale is its ``reasoning_content``."""
    content, calls, finish = _reply(found, chat)
    message = AssistantMessage(
        content=content, reasoning_content=found.rationale, tool_calls=calls or None
    )
    body = ChatCompletion(
        id=f"chatcmpl-{found.id}",
        created=int(time.time()),
        model=chat.model,
        choices=[ChatChoice(message=message, finish_reason=finish)],
        usage=_usage(found),
    ).model_dump()
    if not calls:  # clients check whether the key is there
        del body["choices"][0]["message"]["tool_calls"]
    return body


def _reply(found: AnswerResponse, chat: Chat) -> tuple[str | None, list[ToolCall], FinishReason]:
    """The content or the tool call, and the finish reason."""
    if chat.form is None:
        ends = [found.answer.index(one) for one in chat.stop if one in found.answer]
        content = found.answer[: min(ends)].rstrip() if ends else found.answer
        cut = found.rationale_cut or (found.answer_cut and not ends)
        return content, [], "length" if cut else "stop"
    # Clients take an object with the finish reason "length" for half an object.
    finish: FinishReason = "length" if found.answer_cut else "stop"
    content = json.dumps(found.structured, ensure_ascii=False)
    if chat.fields is not None:
        content = chat.fields.written(found.structured or {})
    if chat.tool is None:
        return content, [], finish
    call = ToolCall(
        id=f"call_{found.id}", function=CalledFunction(name=chat.tool, arguments=content)
    )
    return None, [call], "tool_calls" if finish == "stop" else finish


def _usage(found: AnswerResponse) -> Usage:
    read = found.tokens.small_lm_in + found.tokens.large_lm_in
    written = found.tokens.small_lm_out + found.tokens.large_lm_out
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


async def chat_chunks(
    events: AsyncGenerator[Piece | Written | AnswerResponse, None], ident: str, chat: Chat
) -> AsyncGenerator[str, None]:
    """The answer as server-sent chunks: the rationale's tokens as reasoning, then the answer."""
    head = {
        "id": f"chatcmpl-{ident}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": chat.model,
    }

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**head, "choices": [choice], **({"usage": None} if chat.usage else {})})

    yield chunk({"role": "assistant", "content": ""})
    told = False
    async with aclosing(events):
        async for one in events:
            if isinstance(one, Piece):
                told = True
                yield chunk({"reasoning_content": one.text})
            elif isinstance(one, AnswerResponse):
                if not told:
                    yield chunk({"reasoning_content": one.rationale})
                content, calls, finish = _reply(one, chat)
                if content is not None:
                    yield chunk({"content": content})
                for number, call in enumerate(calls):
                    yield chunk({"tool_calls": [{"index": number, **call.model_dump()}]})
                yield chunk({}, finish)
                if chat.usage:
                    yield _event({**head, "choices": [], "usage": _usage(one).model_dump()})
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
