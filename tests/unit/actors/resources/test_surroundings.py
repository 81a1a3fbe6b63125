"""Ray's folder, token and memory on machines that lack one of them, and clusters that are none."""

from __future__ import annotations

import os
import resource
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import utils as ray_utils

from lmcot import process
from lmcot.actors.resources import cluster, joining, surroundings
from lmcot.actors.resources.surroundings import object_store_bytes, provide_token, ray_folder
from lmcot.config import ActorsSettings
from lmcot.errors import UserError
from lmcot.files import cache_folder, can_write

GIB = 2**30


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """A folder that nobody can make anything in, root included: its parent is a file."""
    file = tmp_path / "file"
    file.touch()
    return file / "home"


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_that_is_too_long_gives_way(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / ("x" * 90)))
    folder, notice = ray_folder()
    longest = f"{folder}/session_2026-11-28_05-57-48_123456_4194304/sockets/plasma_store.99"
    assert len(longest) <= 107
    assert can_write(Path(folder))
    assert f"(from {variable}) has a path of more than 40 bytes" in notice
    assert notice.endswith(f"Ray's files go to '{folder}'")


def test_a_folder_that_cannot_be_written_gives_way(
    refused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(refused))
    monkeypatch.setattr(surroundings, "_SOCKET_PATH_LIMIT", 1000)
    folder, notice = ray_folder()
    assert "cannot be written" in notice
    assert folder in notice


def test_a_short_folder_is_used_even_if_it_is_not_there_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/not-yet")
    assert ray_folder() == ("/tmp/not-yet/ray", "")


def test_no_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "can_write", lambda folder: False)
    with pytest.raises(UserError, match="set RAY_TMPDIR to a folder with a short path"):
        ray_folder()


@pytest.mark.parametrize(
    ("gib", "memory", "shared", "expected"),
    [
        (None, 64 * GIB, 32 * GIB, 4 * GIB),  # the most
        (None, 64 * GIB, 3 * GIB, GIB),  # a third of what is shared
        (None, 2 * GIB, 32 * GIB, int(0.3 * 2 * GIB)),  # Ray's share of what is available
        (None, 0, 0, 128 * 2**20),  # the least
        (0.5, 64 * GIB, 32 * GIB, GIB // 2),  # what is asked for
    ],
)
def test_the_object_store_fits_into_memory(
    gib: float | None, memory: int, shared: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_utils, "estimate_available_memory", lambda: memory)
    monkeypatch.setattr(surroundings, "free_shared_memory", lambda: shared)
    assert object_store_bytes(gib) == expected


def test_a_home_that_cannot_be_written(
    refused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", *process._CACHES):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv("HOME", str(refused))
    monkeypatch.delenv("LMCOT_CACHE", raising=False)
    with pytest.raises(UserError, match=f"HOME is {refused}: set LMCOT_CACHE"):
        cache_folder()
    with pytest.raises(UserError, match="set LMCOT_CACHE"):
        provide_token()
    cache = tmp_path / "cache"
    monkeypatch.setenv("LMCOT_CACHE", str(cache))
    # So that what is set below is taken back.
    for one in ("RAY_AUTH_TOKEN_PATH", *process._CACHES):
        monkeypatch.setenv(one, "")
        os.environ.pop(one)
    provide_token()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    first = token.read_text()
    assert token.parent == cache
    assert len(first) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    os.environ.pop("RAY_AUTH_TOKEN_PATH")
    provide_token()
    assert token.read_text() == first, "processes of one user share it"
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    provide_token(make=False)
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token), "as those who join that cluster"
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    token.unlink()
    provide_token(make=False)
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert not token.exists()
    process.do_without_home()
    assert os.environ["HF_HOME"] == str(cache / "huggingface")


def test_a_cache_that_cannot_be_written(refused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCOT_CACHE", str(refused))
    with pytest.raises(UserError, match="LMCOT_CACHE names it"):
        cache_folder()


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    with pytest.raises(UserError, match="only 256 open files"):
        surroundings.check_open_files()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes"), "does not start.*AF_UNIX"),
        (PermissionError(13, "Permission denied", "/nowhere/.ray"), "does not start.*/nowhere"),
        (Exception("The current node timed out during startup."), "does not start.*timed out"),
        (ValueError("After taking into account object store"), "lower actors.object_store_gib"),
    ],
)
def test_whatever_ray_raises_is_one_sentence(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=said) as told, cluster.ray_cluster(ActorsSettings()):
        pass
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("set_to", "given"), [(None, 4), ("7", None)])
def test_workers_start_at_the_niceness_of_the_settings(
    set_to: str | None, given: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment says is left to Ray, which reads it."""
    asked: list[dict[str, object]] = []
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    if set_to is not None:
        monkeypatch.setenv("RAY_worker_niceness", set_to)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **named: asked.append(named["_system_config"]))
    with cluster.ray_cluster(ActorsSettings(niceness=4)):
        pass
    assert asked[0].get("worker_niceness") == given


@pytest.mark.parametrize("settings", [{}, {"niceness": 4}])
def test_the_niceness_of_a_joined_cluster_is_its_own(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **named: asked.append(named))
    monkeypatch.setattr(cluster, "check_cluster", lambda *_: None)
    with cluster.ray_cluster(ActorsSettings(address="somewhere:1", **settings)):
        pass
    assert "_system_config" not in asked[0]
    assert ("actors.niceness is ignored" in capsys.readouterr().err) == bool(settings)


@contextmanager
def listening() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_is_gone(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = form.format(free_port())
    started = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster answers at '{address}'.*RAY_ADDRESS"):
        joining.check_cluster(address, limit_s=2.0)
    assert time.monotonic() - started < 5
    assert f"waiting up to 2 s for the Ray cluster at '{address}'" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["nowhere", "http://127.0.0.1:1", "127.0.0.1:port", "ray://"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(UserError, match=f"'{address}'"):
        joining.check_cluster(address, limit_s=1.0)


def test_a_wait_for_what_never_speaks_has_a_limit() -> None:
    started = time.monotonic()
    with (
        listening() as port,
        pytest.raises(UserError, match=r"it took more than \d s.*actors.start_timeout_s"),
    ):
        joining.check_cluster(f"127.0.0.1:{port}", limit_s=1.5)
    assert time.monotonic() - started < 6


def test_the_reason_is_what_ray_raised_or_else_logged() -> None:
    raised = '["RuntimeError", "Version mismatch: The cluster was started with 2.9\\nmore"]'
    assert joining._reason(raised, "") == (
        "Version mismatch: The cluster was started with 2.9 (RuntimeError): install the versions "
        "of Ray and Python that the cluster has"
    )
    assert joining._reason("", "first\nthe last words\n\n") == "the last words"
    assert joining._reason("", "") == "Ray ended without a message"


@pytest.mark.parametrize(
    "said",
    [
        "x InvalidAuthToken: y",
        "Received when checking init: Invalid or missing authentication token",
    ],
)
def test_a_refused_token_is_not_waited_for(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"import sys, time; print({said!r}, file=sys.stderr, flush=True)"
    monkeypatch.setattr(joining, "_REHEARSAL", f"{script}; time.sleep(60)")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    started = time.monotonic()
    with pytest.raises(UserError, match="refuses the token in RAY_AUTH_TOKEN: ") as raised:
        joining._rehearse("127.0.0.1:1", limit_s=50.0)
    assert time.monotonic() - started < 30
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RAY_AUTH_TOKEN": "t", "RAY_AUTH_TOKEN_PATH": "/p"}, "refuses the token in RAY_AUTH_TOK"),
        ({"RAY_AUTH_TOKEN_PATH": "/p"}, "refuses the token in '/p', which RAY_AUTH_TOKEN_PATH"),
        ({"RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled sends none"),
        ({}, "there is none here"),
    ],
)
def test_which_token_was_refused(
    environment: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    raised = '["AuthenticationError", "Token authentication is enabled but no token was found"]'
    assert told in joining._reason(raised, "")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    if not environment:
        assert f"refuses the token in '{tmp_path}/.ray/auth_token'" in joining._reason(raised, "")
