"""What the service's replicas take, and a cluster whose Ray Serve others use."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.actors.resources.packing import Node
from lmcot.actors.resources.served import find_served_plan
from lmcot.config import Config, ServeSettings, parse_config
from lmcot.errors import UserError
from lmcot.serve import instance

LOCAL = {"backend": "transformers", "source": "random:llama"}
ENDPOINT = {"backend": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}


def settings(large: dict[str, Any], **serve: Any) -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "frozen": large,
            "refine": {"start_from": "base"},
            "serve": serve,
        }
    )


@pytest.mark.parametrize(
    ("cpus", "frozen", "serve", "expected"),
    [
        # 1 + 1 + 0.1 fit as they are.
        (4.0, LOCAL, {}, (1.0, 1.0, 0.1)),
        # 2.1 s <= 2: s = 0.95.
        (2.0, LOCAL, {}, (0.95, 0.95, 0.095)),
        # 2.1 s <= 1: s = 0.47.
        (1.0, LOCAL, {}, (0.47, 0.47, 0.047)),
        # An endpoint's client waits: 1 + 0.1 + 0.1.
        (2.0, ENDPOINT, {}, (1.0, 0.1, 0.1)),
        # What is set stays: 1.5 + 1.1 s <= 2: s = 0.45.
        (2.0, LOCAL, {"small": {"cpus": 1.5}}, (1.5, 0.45, 0.045)),
        # Replicas that may join have room: 4 s + s + 0.1 s <= 4: s = 0.78.
        (4.0, LOCAL, {"small": {"max_replicas": 4}}, (0.78, 0.78, 0.078)),
    ],
)
def test_cpus_that_are_left_open_are_what_there_is_room_for(
    cpus: float, frozen: dict[str, Any], serve: dict[str, Any], expected: tuple[float, ...]
) -> None:
    plan = find_served_plan(settings(frozen, **serve), [Node("here", {"CPU": cpus})])
    assert not plan.short
    assert tuple(role.cpus for role in plan.roles.values()) == pytest.approx(expected)


def test_what_never_fits_is_refused_by_its_settings() -> None:
    config = settings(LOCAL, small={"cpus": 3, "replicas": 2}, frozen={"gpus": 1})
    refusal = find_served_plan(config, [Node("here", {"CPU": 2.0})]).refusal
    assert "GPU: 1 needed, 0 there" in refusal
    assert "serve.small" in refusal
    config = settings(LOCAL, small={"cpus": 1, "replicas": 4})
    refusal = find_served_plan(config, [Node("here", {"CPU": 2.0})]).refusal
    assert "serve.small.replicas 1 instead of 4" in refusal


def test_an_update_keeps_what_the_replicas_hold() -> None:
    held = {"small": 0.5, "frozen": 0.4, "ingress": 0.05}
    plan = find_served_plan(settings(LOCAL), [Node("here", {"CPU": 1.0})], held)
    assert {name: role.cpus for name, role in plan.roles.items()} == held


def there(**applications: tuple[str | None, str]) -> dict[str, Any]:
    return {
        name.replace("_", "-"): {"route_prefix": prefix, "deployments": {deployment: {}}}
        for name, (prefix, deployment) in applications.items()
    }


OURS = there(lmcot=("/", "Ingress"), lmcot_small=(None, "SmallLM"), lmcot_frozen=(None, "FrozenLM"))
NAMES = ("lmcot-small", "lmcot-frozen", "lmcot")


@pytest.mark.parametrize(
    ("running", "prefix", "reason"),
    [
        ({}, "/", ""),
        (there(other=("/other", "Other")), "/", ""),
        (there(other=("/", "Other")), "/lm", ""),
        (there(other=("/", "Other")), "/", "'other' takes the requests to /"),
        (there(other=("/lm/v1", "Other")), "/lm", "'other' takes the requests to /lm/v1"),
        (OURS, "/lm", "put this run in its place with --update"),
        (there(lmcot=("/x", "Other")), "/", "'lmcot' already: set serve.name"),
        (there(lmcot_small=(None, "Other")), "/", "'lmcot-small' already: set serve.name"),
    ],
)
def test_names_and_paths_that_are_taken(
    monkeypatch: pytest.MonkeyPatch, running: dict[str, Any], prefix: str, reason: str
) -> None:
    monkeypatch.setattr(instance, "_applications", lambda: running)
    asked = ServeSettings(prefix=prefix)
    if not reason:
        instance.check_free(asked, NAMES)
        return
    with pytest.raises(UserError, match=reason):
        instance.check_free(asked, NAMES)


def test_only_a_service_of_lmcots_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "_applications", lambda: there(lmcot=("/", "Other")))
    with pytest.raises(UserError, match="is not a service of lmcot"):
        instance.check_ours(ServeSettings(), NAMES)
    monkeypatch.setattr(instance, "_applications", dict)
    with pytest.raises(UserError, match="no application 'lmcot'"):
        instance.check_ours(ServeSettings(), NAMES)


@pytest.mark.parametrize(
    ("host", "found", "outcome"),
    [
        ("127.0.0.1", "127.0.0.1", "as it is"),
        ("127.0.0.1", "0.0.0.0", "refused"),
        ("127.0.0.1", "10.0.0.1", "refused"),
        ("0.0.0.0", "0.0.0.0", "as it is"),
        ("0.0.0.0", "127.0.0.1", "told"),
    ],
)
def test_where_serve_listens_already_counts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    found: str,
    outcome: str,
) -> None:
    """And it never lets more machines in than the settings say."""
    running = instance.Instance(found, 8000, "", started_here=False)
    monkeypatch.setattr(instance, "find_instance", lambda: running)
    asked = ServeSettings(host=host)
    if outcome == "refused":
        with pytest.raises(UserError, match="for other machines too"):
            instance.start_instance(asked)
        return
    assert instance.start_instance(asked) is running
    assert ("are ignored" in capsys.readouterr().err) == (outcome == "told")
    assert running.url("/lm").endswith(":8000/lm")
    assert running.url("/").endswith(":8000")


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        ({"gpus": 1.5}, "set it to 1 or 2"),
        ({"cpus": 0.00001}, "less than Ray's smallest share"),
        ({"resources": {"CPU": 1}}, "which is Ray's own"),
    ],
)
def test_amounts_that_ray_does_not_grant(role: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        settings(LOCAL, small=role)


@pytest.mark.parametrize("prefix", ["", "lm", "/lm/", "//", "/a b", "/{x}"])
def test_a_prefix_is_a_path(prefix: str) -> None:
    with pytest.raises(UserError, match="is not a path to serve under"):
        settings(LOCAL, prefix=prefix)
