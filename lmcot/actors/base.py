"""What all actors share: how they are called, and how their errors come back."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ray.exceptions import RayError

from lmcot.actors.resources.surroundings import do_without_home
from lmcot.errors import UserError, first_line

_USERS_TO_MEND = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
# torch and safetensors report a full disk as errors of their own, without a number.
_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed writing file")
_COMPILED_KERNELS = 64
"""How many compiled kernels oneDNN keeps, and torch's own cache in front of it.

In bfloat16 on a CPU each shape has kernels of its own, of about 0.8 MB. By default 1024 are kept,
which a process whose batches are all of other lengths fills with what it never uses again; the
layers of a model share some forty in one pass.
"""


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


class ActorBase:
    """Answers RLlib's actor manager: `ping` and `apply`."""

    def ping(self) -> str:
        """Health probe."""
        return "pong"

    def apply(self, func: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a method by its name, or ``func(self, ...)``.

        What it raises is returned as a `RemoteError`.
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
            message = f"{type(error).__name__}: {error}"
            return RemoteError(message, traceback.format_exc(), "bug")


def prepare_process(threads: int) -> None:
    """Fixes the number of threads of this process and quietens the libraries.

    Results to the bit depend on the number of threads. Ray sets OMP_NUM_THREADS to the actor's
    CPUs, which torch would otherwise take up.
    """
    do_without_home()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Read when the first kernel is made.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_COMPILED_KERNELS))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(_COMPILED_KERNELS))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
