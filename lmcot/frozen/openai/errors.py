"""What goes wrong at an endpoint: as a typed failure, and as a sentence for the user."""

from __future__ import annotations

import time
from typing import Any

import openai

from lmcot.config import OpenAIFrozen
from lmcot.frozen.openai.access import Access
from lmcot.frozen.openai.form import complains_of_length
from lmcot.frozen.openai.replies import ErrorBody, Faulty, Garbled, said
from lmcot.frozen.pacing import retry_after_s
from lmcot.records import Failure, FailureKind

_TRANSIENT_STATUS = (408, 409, 425, 429)
# The endpoint does not know the method, or the version of HTTP.
_PERMANENT_STATUS = (501, 505)
LONGEST_REASON = 300
"""Most characters of a failure's reason."""
_LONGEST_BODY = 4000
"""Most characters of an endpoint's refusal that are read."""


class EndpointError(Exception):
    """What went wrong with a request, as its `Failure`.

    Attributes:
        status: of HTTP; 0 if there was no answer.
        again: whether another try may help.
        wait_s: seconds that the endpoint asks to wait before that.
        said: what the endpoint answered, without secrets.
    """

    def __init__(
        self,
        failure: Failure,
        *,
        status: int = 0,
        again: bool = False,
        wait_s: float = 0.0,
        said: str = "",
    ) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.status = status
        self.again = again
        self.wait_s = wait_s
        self.said = said

    def fault(self) -> tuple[int, str]:
        """Returns what two errors have in common if the request failed in the same way."""
        return self.status, self.failure.reason


class Faults:
    """Tells what an error means: whether it is transient, and whether another try may help."""

    def __init__(self, settings: OpenAIFrozen, access: Access) -> None:
        self._settings = settings
        self._access = access

    def error_of(self, error: Exception) -> EndpointError:
        """The error of a request that was sent, or could not be.

        Raises:
            TypeError: if it is an error of the program.
        """
        match error:
            case openai.APIStatusError():
                return self._refusal(error)
            case openai.APITimeoutError():
                reason = "the request timed out: the endpoint did not reply in time"
                return self.error(FailureKind.TRANSIENT, reason, again=True)
            case openai.OpenAIError():
                reason = f"the connection to the endpoint failed ({_cause(error)})"
                return self.error(FailureKind.TRANSIENT, reason, again=True)
            case UnicodeEncodeError():
                reason = f"the prompt cannot be sent as UTF-8 ({error.reason})"
                return self.error(FailureKind.PERMANENT, reason)
            case ErrorBody():
                again = _may_pass(error.status) or error.status == 200
                kind = FailureKind.TRANSIENT if again else FailureKind.PERMANENT
                text = str(error)
                return self.error(kind, text, status=error.status, again=again, said=text)
            case Garbled():
                return self.error(FailureKind.TRANSIENT, str(error), status=200, again=True)
            case Faulty():
                return self.error(FailureKind.PERMANENT, str(error), status=200, again=error.again)
        raise TypeError(f"no error of an endpoint: {error!r}") from error

    def error(
        self, kind: FailureKind, reason: str, *, said: str = "", **more: Any
    ) -> EndpointError:
        """An error with this reason, without secrets: some endpoints repeat the key."""
        line = " ".join(self._access.redacted(reason).split())
        said = self._access.redacted(said)
        return EndpointError(Failure(kind, line[:LONGEST_REASON]), said=said, **more)

    def _refusal(self, error: openai.APIStatusError) -> EndpointError:
        status = error.status_code
        # A quota is not filled up again within the time of a request.
        again = _may_pass(status) and _code(error) != "insufficient_quota"
        reason = f"the endpoint answers with status {status}: {said(error.body or error.message)}"
        if status in (401, 403):
            reason = f"{self._key_in_words()}: {reason}"
        return self.error(
            FailureKind.TRANSIENT if _may_pass(status) else FailureKind.PERMANENT,
            reason,
            status=status,
            again=again,
            wait_s=retry_after_s(error.response.headers.get("retry-after"), time.time()),
            said=_named_in(error),
        )

    def _key_in_words(self) -> str:
        variable = self._settings.api_key_env
        if self._access.key:
            return f"the key in {variable} is refused"
        if self._access.secrets:
            return "what frozen.headers sends is refused"
        return f"no key was sent, for {variable} is not set"


def complaint(error: EndpointError, settings: OpenAIFrozen) -> str:
    """What to tell the user, by the status that the endpoint answered a first request with."""
    endpoint, reason = f"the endpoint {settings.base_url}", error.failure.reason
    if error.status == 0:
        return f"{endpoint} cannot be reached ({reason}): start it, or correct frozen.base_url"
    if error.status == 200:
        return f"{endpoint} gives no completion ({reason}): {_after_a_bad_reply(error)}"
    if error.status in (401, 403):
        return (
            f"{endpoint} refuses access ({reason}): put a valid key into the environment "
            f"variable {settings.api_key_env}, or name another in frozen.api_key_env"
        )
    if error.status == 429:
        return (
            f"{endpoint} admits no more requests at present ({reason}): wait, have the limit "
            "raised, or lower frozen.concurrency and frozen.requests_per_minute"
        )
    if complains_of_length(error.said):
        return (
            f"{endpoint} refuses the length of replies ({reason}): change "
            f"frozen.max_answer_tokens ({settings.max_answer_tokens}) or "
            f"frozen.max_rationale_tokens ({settings.max_rationale_tokens})"
        )
    if error.status == 404:
        return (
            f"{endpoint} knows no model '{settings.model}', or no {settings.api} API ({reason}): "
            "correct frozen.model, frozen.base_url or frozen.api"
        )
    return (
        f"{endpoint} does not answer a first request ({reason}): check frozen.base_url, "
        "frozen.model and frozen.api; parameters that it refuses can be renamed, left out or added "
        "with frozen.rename_parameters, frozen.drop_parameters and frozen.extra_body"
    )


def _after_a_bad_reply(error: EndpointError) -> str:
    if error.said:
        return "that is what it says itself; check frozen.model and your account there"
    return "it does not speak the OpenAI API there; correct frozen.base_url or frozen.api"


def _cause(error: openai.OpenAIError) -> str:
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__


def _may_pass(status: int) -> bool:
    """Whether another try may not meet this status again."""
    return status in _TRANSIENT_STATUS or (status >= 500 and status not in _PERMANENT_STATUS)


def _named_in(error: openai.APIStatusError) -> str:
    """What the refusal is about: the parameter that it names, else all of its text.

    What it repeats of the request is left out, since that names every parameter.
    """
    body = error.body if isinstance(error.body, dict) else {}
    detail = body.get("detail") or body.get("message")
    listed = detail.get("detail") if isinstance(detail, dict) else detail
    if isinstance(listed, list) and all(isinstance(one, dict) for one in listed):
        return "; ".join(
            f"{'.'.join(map(repr, one.get('loc', ())))}: {one.get('type')}: {one.get('msg')}"
            for one in listed
        )[:_LONGEST_BODY]
    if isinstance(body.get("message"), str):
        return f"'{body.get('param')}': {body.get('code')}: {said(body)}"[:_LONGEST_BODY]
    return error.response.text[:_LONGEST_BODY]


def _code(error: openai.APIStatusError) -> Any:
    return error.body.get("code") if isinstance(error.body, dict) else None
