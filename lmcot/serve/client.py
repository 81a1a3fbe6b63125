"""A client of the service in a few lines, on the standard library alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Context = str | Sequence[Mapping[str, str]]


class ServiceError(Exception):
    """The service refused a request, or failed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Client:
    """A client of the service at an address."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, token: str = "", timeout_s: float = 120.0
    ) -> None:
        self._url = url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"
        self._timeout_s = timeout_s

    def answer(self, question: str, context: Context = "", **options: Any) -> dict[str, Any]:
        """A guided answer, as `POST /v1/answer` gives it.

        Args:
            options: ``samples``, ``max_tokens``, ``temperature``, ``seed``, ``unguided``.

        Raises:
            ServiceError: with the HTTP status.
        """
        with self._post("/v1/answer", question, context, options) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def rationale(self, question: str, context: Context = "", **options: Any) -> dict[str, Any]:
        """Guidance alone, as `POST /v1/rationale` gives it."""
        with self._post("/v1/rationale", question, context, options) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def stream(
        self, question: str, context: Context = "", **options: Any
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events as they come: ``token``, ``rationale``, then ``answer``.

        Raises:
            ServiceError: also for an ``error`` event.
        """
        with self._post("/v1/answer", question, context, {**options, "stream": True}) as reply:
            name = ""
            for line in reply:
                text = line.decode().rstrip("\n")
                if text.startswith("event: "):
                    name = text.removeprefix("event: ")
                elif text.startswith("data: "):
                    data = json.loads(text.removeprefix("data: "))
                    if name == "error":
                        raise ServiceError(data["error"]["code"], data["error"]["message"])
                    yield name, data

    def _post(self, path: str, question: str, context: Context, options: Mapping[str, Any]) -> Any:
        given = context if isinstance(context, str) else list(context)
        body = json.dumps({"question": question, "context": given, **options}).encode()
        request = urllib.request.Request(self._url + path, body, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                message = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = text[:200] or error.reason
            raise ServiceError(error.code, message) from None
