"""The HTTP API: guided answers, guidance alone, and OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from lmcot.answering.exchange import Piece, Written
from lmcot.answering.guidance import Ask
from lmcot.answering.refused import Refused
from lmcot.answering.schemas import AnswerRequest, AnswerResponse
from lmcot.config import SampleData
from lmcot.data.loaders import load_examples
from lmcot.serve.chat import chat_chunks, chat_completion
from lmcot.serve.errors import Rejected, body_of, error_body
from lmcot.serve.guard import Guard, spent
from lmcot.serve.openai_schemas import ChatCompletion, ChatRequest, Model, Models
from lmcot.serve.schemas import (
    AnswersRequest,
    AnswersResponse,
    ErrorResponse,
    RationaleRequest,
    RationaleResponse,
)
from lmcot.serve.service import NotReady, Service
from lmcot.version import __version__

_log = logging.getLogger("lmcot.serve")
_BEARER = [
    Security(HTTPBearer(auto_error=False, description="Where the service asks for a token."))
]
"""For the API's description; the `Guard` checks the tokens."""
_CHAT = "/v1/chat/completions"


def make_app(service: Service, digests: Sequence[str] = (), *, tells_id: bool = True) -> Any:
    """The ASGI application, behind its `Guard`, which explains the other arguments."""
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (401, 413, 422, 502, 503, 504)
    }
    # The page /docs with its scripts from here: it needs no internet, and runs nobody else's.
    app = FastAPIOffline(
        title="lmcot", version=__version__, responses=errors, docs_url="/docs", redoc_url=None,
        static_url="/docs-files", swagger_ui_oauth2_redirect_url="/docs-files/oauth2-redirect",
        description="Guided answers: a small LM writes a rationale, a frozen large one answers.",
    )  # fmt: skip
    _add_answers(app, service)
    _add_chat(app, service)
    _add_health(app, service)
    _add_errors(app)
    guarded = Guard(
        app, service.settings, service.meters, service.intake, digests=digests, tells_id=tells_id
    )
    if not service.settings.cors_origins:
        return guarded
    # Outside the guard: browsers send preflight requests without a token, and must see refusals.
    return CORSMiddleware(
        guarded, allow_origins=list(service.settings.cors_origins),
        allow_methods=["GET", "POST"], allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )  # fmt: skip


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/answer", response_model=AnswerResponse, dependencies=_BEARER)
    async def answer(body: AnswerRequest, request: Request) -> Any:
        """A guided answer; with `stream` as server-sent events: `token` and `rationale` for each
        rationale, then `answer`, or `error`."""
        ident = request.state.request_id
        ask = await service.admit(body, ident, tokens=body.stream)
        if body.stream:
            return _streamed(_answer_events(service, ask))
        return await service.answer(ask)

    @app.post("/v1/answers", dependencies=_BEARER)
    async def answers(body: AnswersRequest, request: Request) -> AnswersResponse:
        """Several answers at once, in the order of the requests."""
        limit = service.settings.limits.batch
        if len(body.requests) > limit:
            raise Refused(f"there are {len(body.requests)} requests, more than {limit}")
        ident = request.state.request_id
        asks = [
            await service.admit(one, f"{ident}-{number}")
            for number, one in enumerate(body.requests)
        ]

        async def one_of(ask: Ask) -> AnswerResponse | ErrorResponse:
            try:
                return await service.answer(ask)
            except (Refused, Rejected) as error:
                return ErrorResponse.model_validate(body_of(error))

        return AnswersResponse(answers=list(await asyncio.gather(*map(one_of, asks))))

    @app.post("/v1/rationale", dependencies=_BEARER)
    async def rationale(body: RationaleRequest, request: Request) -> RationaleResponse:
        """Guidance alone, for those who ask a large LM of their own."""
        return await service.rationale(body, request.state.request_id)


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post(
        _CHAT, response_model=ChatCompletion, dependencies=_BEARER,
        responses={400: {"model": ErrorResponse}},
    )  # fmt: skip
    async def chat(body: ChatRequest, request: Request) -> Any:
        """OpenAI's call: the last user message is the question, system messages are instructions,
        earlier messages are context."""
        ident = request.state.request_id
        chat, ask = await asyncio.to_thread(service.chats.chat, body, ident, spent=spent())
        if body.stream:
            return _streamed(chat_chunks(service.events(ask), ident, chat), errors=True)
        return JSONResponse(chat_completion(await service.answer(ask), chat))

    name = service.settings.name

    @app.get("/v1/models", dependencies=_BEARER)
    async def models() -> Models:
        """The one model."""
        return Models(data=[Model(id=name)])

    @app.get("/v1/models/{model}", dependencies=_BEARER, responses={404: {"model": ErrorResponse}})
    async def model(model: str) -> Model:
        """The model by its name."""
        if model != name:
            raise Rejected(404, f"there is no model '{model[:100]}', only '{name}'", param="model")
        return Model(id=name)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """Whether both models answer."""
        if service.intake.ending:
            raise Rejected(503, "not ready: the service is shutting down", "overloaded_error")
        try:
            async with asyncio.timeout(5):
                versions = await service.ready()
        except NotReady as error:
            raise Rejected(503, f"not ready: {error}", "overloaded_error") from None
        except Exception as error:
            raise Rejected(503, f"not ready: {type(error).__name__}", "overloaded_error") from None
        return {"status": "ready", "versions": versions.model_dump()}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics of this replica."""
        return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)

    examples = _examples()

    @app.get("/examples.json", include_in_schema=False)
    async def some() -> list[dict[str, Any]]:
        return examples

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """A page to try the service on."""
        text = (resources.files("lmcot.serve") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _PAGE_POLICY})


def _examples() -> list[dict[str, Any]]:
    """Questions of HotpotQA, each with its gold paragraphs and two others."""
    loaded = load_examples(SampleData(kind="sample", split="validation"), limit=6).examples
    found = []
    for one in loaded:
        gold = {fact.title for fact in one.supporting_facts}
        others = [paragraph for paragraph in one.context if paragraph.title not in gold][:2]
        shown = [p for p in one.context if p.title in gold or p in others]
        context = [{"title": p.title, "text": " ".join(p.sentences)} for p in shown]
        found.append({"question": one.question, "context": context})
    return found


_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    @app.exception_handler(Rejected)
    async def refused(request: Request, error: Refused | Rejected) -> JSONResponse:
        body = body_of(error, openai=_is_chat(request))
        status = body["error"]["code"]
        return JSONResponse(body, status, {"retry-after": "1"} if status == 503 else None)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            error_body(error.status_code, str(error.detail)), error.status_code, error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        if "json" not in kind.lower():
            reason = (
                f"the body must be JSON, but the header content-type is '{kind[:100]}': send "
                "'content-type: application/json'"
            )
            return JSONResponse(error_body(415, reason), 415)
        status = 400 if _is_chat(request) else 422
        message, where = _complaint(error)
        return JSONResponse(error_body(status, message, param=where), status)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body_of(_told(error)), 500)


def _told(error: Exception) -> Refused | Rejected:
    """What the client is told of an error; only the log has the details of one of ours."""
    if isinstance(error, Refused | Rejected):
        return error
    _log.exception("a request failed", exc_info=error)
    return Rejected(500, "the service failed", "server_error")


def _complaint(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, and with which field of it."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return f"the body is not valid JSON: {reason} (at character {first['loc'][-1]})", None
    where, at = [], error.body
    # Names of types stand between the names of fields; the body does not hold them.
    for number, part in enumerate(first["loc"][1:], 2):
        inside = (isinstance(at, dict) and part in at) or (
            isinstance(at, list) and isinstance(part, int) and part < len(at)
        )
        if inside:
            where.append(str(part))
            at = at[part]
        elif first["type"] == "missing" and number == len(first["loc"]):
            where.append(str(part))
    name = ".".join(where)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "there is no such field: leave it out"
    return f"{name or 'the body'}: {reason}", name or None


def _is_chat(request: Request) -> bool:
    return getattr(request.scope.get("route"), "path", None) == _CHAT


async def _answer_events(service: Service, ask: Ask) -> AsyncGenerator[str, None]:
    async with aclosing(service.events(ask)) as events:
        async for one in events:
            if isinstance(one, Piece):
                yield _event("token", {"sample": one.sample, "text": one.text})
            elif isinstance(one, Written):
                yield _event("rationale", {"sample": one.sample, "text": one.text})
            else:
                yield _event("answer", one.model_dump())


def _streamed(events: AsyncGenerator[str, None], *, errors: bool = False) -> StreamingResponse:
    """Server-sent events; an error after the beginning is an event, too."""

    async def all_of_it() -> AsyncGenerator[str, None]:
        async with aclosing(events):
            try:
                async for one in events:
                    yield one
            except Exception as error:
                body = body_of(_told(error), openai=errors)
                yield f"data: {json.dumps(body)}\n\n" if errors else _event("error", body)

    return StreamingResponse(
        all_of_it(), media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
