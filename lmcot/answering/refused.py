"""Why a question gets no answer: errors that a program catches, and that HTTP gives a status."""

from __future__ import annotations

from lmcot.errors import UserError


class Refused(UserError):
    """The question, its context or an option makes no sense, or is beyond the limits."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """Args: param: the argument, or the field of a request, that is wrong."""
        super().__init__(message)
        self.param = param


class FrozenLMFailed(Refused):
    """The frozen LM did not answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the frozen LM did not answer: {reason}")


class UnfitAnswer(Refused):
    """The answer does not fit the JSON schema that was given for it."""
