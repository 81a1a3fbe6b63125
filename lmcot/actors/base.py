"""What all actors share: how they are called, and how their errors come back."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ray.exceptions import RayError

from lmcot.actors.kept import Split
from lmcot.errors import UserError, first_line
from lmcot.models.generation.requests import EngineLost

_USERS_TO_MEND = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
# torch and safetensors report a full disk as errors of their own, without a number.
_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed writing file")


class Unanswered(UserError):
    """What an actor needed of another one did not come: a later attempt may fare better."""


class NotSetUp(Exception):
    """Ray started the actor anew without anybody noticing: it has not been set up again."""


@dataclass(frozen=True, slots=True)
class RemoteError:
    """An error inside an actor, returned instead of raised.

    RLlib's actor manager retires an actor on any task error; one that merely refused its work is
    healthy.
    """

    message: str
    details: str
    kind: Literal["user", "unanswered", "not set up", "bug"]
    """Whether it is the user's to mend, another attempt may mend it, the actor is to be set up
    first, or it is an error of ours."""

    def to_exception(self, actor: str) -> Exception:
        """The error as the driver raises it."""
        if self.kind == "user":
            return UserError(self.message)
        if self.kind == "unanswered":
            return Unanswered(self.message)
        return RuntimeError(f"the {actor} failed: {self.message}\n{self.details}")


def unwrap(value: Any, role: str) -> Any:
    """What a call returned; raises the error that it returned instead."""
    if isinstance(value, RemoteError):
        raise value.to_exception(f"{role} actor")
    return value


class ActorBase:
    """Answers RLlib's actor manager: `ping` and `apply`; and fleets: `apply_split`."""

    def ping(self) -> str:
        """Health probe."""
        return "pong"

    def apply_split(
        self, kept: int, func: str | Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Calls a method that returns a `Split`, as `apply` does, for one object each of its parts.

        Args:
            kept: number of the values that are kept; None in place of each if the method failed.
        """
        result = self.apply(func, *args, **kwargs)
        if isinstance(result, Split):
            return result.told, *result.kept
        return result, *[None] * kept

    def apply(self, func: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a method by its name, or ``func(self, ...)``.

        What it raises is returned as a `RemoteError`. An engine that has lost one of its processes
        ends this one too, so that Ray starts the actor again.
        """
        try:
            if isinstance(func, str):
                return getattr(self, func)(*args, **kwargs)
            return func(self, *args, **kwargs)
        except NotSetUp as error:
            return RemoteError(str(error), "", "not set up")
        except Unanswered as error:
            return RemoteError(str(error), "", "unanswered")
        except UserError as error:
            return RemoteError(str(error), "", "user")
        except RayError as error:  # of a call to another actor, or of an object that is gone
            return RemoteError(f"{type(error).__name__}: {first_line(error)}", "", "unanswered")
        except OSError as error:
            kind: Literal["user", "bug"] = "user" if error.errno in _USERS_TO_MEND else "bug"
            return RemoteError(str(error), traceback.format_exc(), kind)
        except Exception as error:  # the boundary of the process: it is raised again in the driver
            if any(sign in str(error) for sign in _FULL_DISK):
                message = "no space left on the disk: free some and run the same command again"
                return RemoteError(message, traceback.format_exc(), "user")
            if isinstance(error, EngineLost) or isinstance(error.__cause__, EngineLost):
                print(f"{error}: this actor ends, and is started again", flush=True)
                os._exit(1)
            message = f"{type(error).__name__}: {error}"
            return RemoteError(message, traceback.format_exc(), "bug")
