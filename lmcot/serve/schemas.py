"""What only the HTTP API takes and gives: batches, guidance alone, errors."""

from __future__ import annotations

from pydantic import BaseModel, Field

from lmcot.answering.schemas import AnswerRequest, AnswerResponse, Asked, Drawing, Question


class AnswersRequest(Asked):
    """Asks for several."""

    requests: list[AnswerRequest] = Field(min_length=1)


class RationaleRequest(Question, Drawing):
    """Asks for guidance alone."""


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    code: int
    param: str | None = None


class ErrorResponse(BaseModel):
    """The shape of every error."""

    error: ErrorBody


class AnswersResponse(BaseModel):
    """Several, in the order of the requests; an error in the place of each that failed."""

    answers: list[AnswerResponse | ErrorResponse]


class Rationale(BaseModel):
    """What the small LM wrote."""

    text: str
    concluded: str = Field(description="The answer that it states itself, if any.")
    tokens: int
    finish_reason: str


class RationaleResponse(BaseModel):
    """Guidance alone."""

    id: str
    rationales: list[Rationale]
    prompt_tokens: int
    version: str
