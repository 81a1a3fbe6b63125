"""Tokens of a request and its reply, estimated by length where the endpoint does not count them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lmcot.frozen.openai.replies import Reply

_BYTES_PER_TOKEN = 4


def counted(reply: Reply, body: dict[str, Any]) -> Reply:
    """The reply, with estimates where the endpoint gives no count."""
    tokens_in = reply.tokens_in or _tokens_in(body)
    tokens_out = reply.tokens_out or _length_in_tokens(_new_text(reply, body))
    if (tokens_in, tokens_out) == (reply.tokens_in, reply.tokens_out):
        return reply
    return replace(reply, tokens_in=tokens_in, tokens_out=tokens_out, estimated=True)


def _new_text(reply: Reply, body: dict[str, Any]) -> str:
    if body.get("echo"):
        return reply.text.removeprefix(body["prompt"])
    return reply.thinking + reply.text


def estimate(body: dict[str, Any]) -> float:
    """Estimates the tokens that a request may read and write at most."""
    return float(_tokens_in(body) + body["max_tokens"])


def _tokens_in(body: dict[str, Any]) -> int:
    texts = [body["prompt"]] if "prompt" in body else [one["content"] for one in body["messages"]]
    return sum(map(_length_in_tokens, texts))


def _length_in_tokens(text: str) -> int:
    """Counts bytes, since scripts with many bytes per character take many tokens."""
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)
