"""Errors as HTTP tells them: a status, and a body of one shape."""

from __future__ import annotations

from typing import Any

from lmcot.answering.refused import FrozenLMFailed, Refused, UnfitAnswer

INVALID = "invalid_request_error"
_STATUS_AND_KIND: dict[type[Refused], tuple[int, str]] = {
    Refused: (422, INVALID),
    UnfitAnswer: (422, "unfit_answer_error"),
    FrozenLMFailed: (502, "upstream_error"),
}


class Rejected(Exception):
    """A request that the service does not serve, whatever it asks the models."""

    def __init__(
        self, status: int, message: str, kind: str = INVALID, param: str | None = None
    ) -> None:
        """Args: param: the field of the request that is at fault."""
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param


def error_body(
    status: int, message: str, kind: str = INVALID, param: str | None = None
) -> dict[str, Any]:
    """The shape of every error; OpenAI's clients read it too."""
    return {"error": {"message": message, "type": kind, "code": status, "param": param}}


def body_of(error: Refused | Rejected, *, openai: bool = False) -> dict[str, Any]:
    """An error's body; OpenAI's clients expect 400 where others get 422."""
    if isinstance(error, Rejected):
        status, kind = error.status, error.kind
    else:
        status, kind = _STATUS_AND_KIND[type(error)]
    return error_body(400 if openai and status == 422 else status, str(error), kind, error.param)
