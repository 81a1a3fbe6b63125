"""The service between stand-ins for both models, on a real HTTP server: for browsers, fuzzers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from lmcot.answering.exchange import Draw, Piece, Query, Reply, Shown, Told, Written
from lmcot.answering.schemas import Versions
from lmcot.config import parse_config
from lmcot.records import Answer, Failure, FailureKind, Paragraph
from lmcot.serve.api import make_app
from lmcot.serve.service import Service


class _Small:
    """Repeats the context's first sentence, word by word."""

    async def fit_context(
        self, question: str, context: Sequence[Paragraph]
    ) -> tuple[Paragraph, ...]:
        return tuple(context)

    async def write(
        self, question: str, context: Sequence[Paragraph], draw: Draw, first_answer: str = ""
    ) -> AsyncGenerator[Told, None]:
        yield Shown(tuple(context), 40, "a stand-in")
        if "refuse" in question:
            yield Failure(FailureKind.PERMANENT, "it was told to refuse")
            return
        first = next((one.sentences[0] for one in context if one.sentences), "Nothing known.")
        for sample in range(draw.samples):
            for word in first.split():
                await asyncio.sleep(1.0 if "take your time" in question else 0.01)
                if draw.tokens:
                    yield Piece(sample, f"{word} ")
            end = "length" if "is cut" in question else "eos"
            yield Written(sample, first, len(first.split()), end)


class _Frozen:
    """Has one answer where it is guided, and another one where it is not."""

    async def answer(self, query: Query) -> Reply:
        await asyncio.sleep(0.01)
        answer = "a guess" if query.rationale is None else "the answer"
        return Reply(Answer(answer, answer, 100, 2), version="a stand-in")

    async def answer_first(self, query: Query) -> Reply:
        return await self.answer(query)

    async def write_object(self, query: Query, answer: str, schema: str) -> Reply:
        properties = json.loads(schema).get("properties", {})
        found = dict.fromkeys(properties, answer)
        return Reply(Answer(json.dumps(found), "", 50, 9), version="a stand-in")


def stub_app(**settings: Any) -> Any:
    """The application.

    Args:
        settings: of ``serve``.
    """
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "refine": {"start_from": "base"},
            "serve": settings,
        }
    )

    async def ready() -> Versions:
        return Versions(small="a stand-in", frozen="a stand-in")

    return make_app(Service(config, _Small(), _Frozen(), ready))


@contextmanager
def serving(prefix: str = "", **settings: Any) -> Iterator[str]:
    """Gives its address.

    Args:
        prefix: the path that it is reached under.
    """
    app = stub_app(**settings)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        mounted = Starlette(routes=[Mount(prefix, app)]) if prefix else app
        server = uvicorn.Server(uvicorn.Config(mounted, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}{prefix}"
        finally:
            server.should_exit = True
            thread.join(30)
