"""OpenAI's chat completions: their clients get guided answers by another base URL."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from lmcot.serve.deployments import Piece, Written
from lmcot.serve.guidance import Refused
from lmcot.serve.schemas import AnswerRequest, AnswerResponse, ChatMessage, ChatRequest

_WITH_CONTEXT = re.compile(r"\A\s*(?:Context:\s*)?(.*\S)\s*\n\s*Question:\s*(.+?)\s*\Z", re.DOTALL)
"""A question below its context, as the page's examples write them."""


def question_of(request: ChatRequest) -> AnswerRequest:
    """The last user message is the question, or "Context: ... Question: ..."; what was said before
    is context.

    Raises:
        Refused: if there is no user message, or it says nothing.
    """
    texts = [(message.role, _text(message)) for message in request.messages]
    last = max((at for at, (role, _) in enumerate(texts) if role == "user"), default=None)
    if last is None:
        raise Refused(422, "messages holds no user message: the last one is the question")
    passages = [text for _, text in texts[:last] if text.strip()]
    question = texts[last][1].strip()
    if found := _WITH_CONTEXT.match(question):
        passages.append(found[1])
        question = found[2]
    if not question:
        raise Refused(422, "the last user message is empty: it is the question")
    return AnswerRequest(
        question=question,
        context="\n\n".join(passages),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        temperature=request.temperature,
        seed=abs(request.seed) % 2**63 if request.seed is not None else None,
    )


def _text(message: ChatMessage) -> str:
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    parts = [part for part in message.content if part.get("type") == "text"]
    if len(parts) < len(message.content):
        raise Refused(422, "a message holds a part that is no text")
    texts = [part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refused(422, "a text part of a message holds no text")
    return "\n".join(str(text) for text in texts)


def chat_completion(found: AnswerResponse, model: str) -> dict[str, Any]:
    """The answer as OpenAI's clients read it; the rationale stands where reasoning does."""
    tokens = found.tokens
    read, written = (
        tokens.small_lm_in + tokens.large_lm_in,
        tokens.small_lm_out + tokens.large_lm_out,
    )
    return {
        "id": f"chatcmpl-{found.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": found.answer,
                    "reasoning_content": found.rationale,
                },
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
    }


async def chat_chunks(
    events: AsyncIterator[Piece | Written | AnswerResponse], ident: str, model: str
) -> AsyncIterator[str]:
    """The same as server-sent chunks: the rationale's tokens as reasoning, then the answer."""
    created = int(time.time())

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        body = {
            "id": f"chatcmpl-{ident}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    yield chunk({"role": "assistant", "content": ""})
    async for one in events:
        if isinstance(one, Piece):
            yield chunk({"reasoning_content": one.text})
        elif isinstance(one, AnswerResponse):
            yield chunk({"content": one.answer})
    yield chunk({}, "stop")
    yield "data: [DONE]\n\n"
