"""How errors inside an actor come back to the driver."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from lmcot.actors.base import ActorBase, RemoteError
from lmcot.errors import UserError
from lmcot.models.generation.requests import EngineLost


def raising(error: Exception) -> RemoteError:
    def call(actor: Any) -> None:
        raise error

    returned = ActorBase().apply(call)
    assert isinstance(returned, RemoteError)
    return returned


def test_results_pass_through() -> None:
    assert ActorBase().apply(lambda actor, x: x + 1, x=2) == 3


@pytest.mark.parametrize(
    "error",
    [
        UserError("mend it"),
        OSError(errno.ENOSPC, "No space left on device", "checkpoint.pt"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        PermissionError(errno.EACCES, "Permission denied", "/x"),
    ],
)
def test_what_the_user_can_mend_is_raised_as_a_user_error(error: Exception) -> None:
    raised = raising(error).to_exception("learner actor")
    assert isinstance(raised, UserError)
    assert "\n" not in str(raised)


def test_a_bug_keeps_its_traceback_and_names_the_actor() -> None:
    raised = raising(ValueError("a bug")).to_exception("learner actor")
    assert isinstance(raised, RuntimeError)
    assert "the learner actor failed: ValueError: a bug" in str(raised)
    assert "Traceback" in str(raised)
    missing = raising(FileNotFoundError(errno.ENOENT, "No such file", "/x"))
    assert missing.kind == "bug"


@pytest.mark.parametrize("within", [False, True])
def test_an_actor_whose_engine_lost_a_process_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], within: bool
) -> None:
    """So that Ray starts it again; the error may be the cause of the one that is raised."""
    ended: list[int] = []
    monkeypatch.setattr("lmcot.actors.base.os._exit", ended.append)

    def call(actor: Any) -> None:
        lost = EngineLost("a process of vLLM has died")
        if within:
            raise RuntimeError("the generation engine failed") from lost
        raise lost

    ActorBase().apply(call)
    assert ended == [1]
    assert "this actor ends, and is started again" in capsys.readouterr().out
