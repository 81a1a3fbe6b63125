"""`lmcot serve`: serves a run directory's pair until a signal ends it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.api import RunTarget

from lmcot.actors.resources.cluster import nodes, ray_cluster
from lmcot.actors.resources.plan import Plan
from lmcot.actors.resources.served import find_served_plan
from lmcot.answering.pair import Pair, learned, open_pair
from lmcot.config import ServeSettings
from lmcot.errors import UserError
from lmcot.monitor.progress import say
from lmcot.network import is_loopback, why_taken
from lmcot.serve.access import token_digests
from lmcot.serve.app import applications, names
from lmcot.serve.instance import (
    Instance,
    check_free,
    check_ours,
    check_strangers,
    deploy,
    find_instance,
    finish_requests,
    remove,
    start_instance,
)

if TYPE_CHECKING:
    from lmcot.storage import Place


def serve(
    run_dir: Place,
    overrides: Sequence[str] = (),
    *,
    policy: str | None = None,
    update: bool = False,
    status: bool = False,
    as_json: bool = False,
) -> None:
    """Serves a run's trained pair.

    Args:
        policy: the policy to serve; unset: the most trained one.
        update: replace the service that runs on the cluster of RAY_ADDRESS, replica by replica,
            and return.
        status: only show what runs there.
        as_json: show that as a line of JSON.

    Raises:
        UserError: if there is no trained pair, no room, or the port, path or name is taken.
    """
    pair = open_pair(run_dir, policy, list(overrides))
    if not status:
        pair = learned(pair)
    if status or update:
        if not ray.is_initialized() and not _joined(pair):
            raise UserError(
                "which service? Set RAY_ADDRESS to its cluster's address, and what else 'lmcot "
                "serve' says when it starts"
            )
        with ray_cluster(pair.config.actors):
            if status:
                _show_status(pair, as_json=as_json)
            else:
                _update(pair)
        return
    settings = pair.config.serve
    digests = token_digests(settings)
    if not ray.is_initialized() and not _joined(pair):
        check_port(settings.host, settings.port)
    try:
        with _Signals() as signals, ray_cluster(pair.config.actors):
            signals.install()  # Ray has put its own in their place.
            _serve(pair, digests, signals)
    except SystemExit:  # by Ray's own handler, while it starts
        raise KeyboardInterrupt from None


def _serve(pair: Pair, digests: Sequence[str], signals: _Signals) -> None:
    settings = pair.config.serve
    instance = start(pair, digests)
    try:
        _tell(pair, instance, digests)
        signals.wait()
        say("serve: shutting down; requests in flight are answered first")
        finish_requests(settings.name, settings.shutdown_s)
    finally:
        _remove(pair, instance)


def start(pair: Pair, digests: Sequence[str] = ()) -> Instance:
    """Starts a pair's service on the cluster, and waits until it answers.

    Nothing is left behind if that fails.

    Args:
        digests: digests of the accepted tokens.

    Raises:
        UserError: if there is no room, or the port, path or name is taken.
    """
    settings = pair.config.serve
    check_free(settings, names(settings))
    plan = find_served_plan(pair.config, nodes(free=True))
    _check_room(pair, plan)
    if find_instance() is None:
        check_port(settings.host, settings.port)
    instance = start_instance(settings)
    try:
        deploy(_targets(pair, plan, digests), settings.start_timeout_s)
        check_strangers(instance, settings, tokens=bool(digests))
    except BaseException:
        _remove(pair, instance)
        raise
    return instance


def _remove(pair: Pair, instance: Instance) -> None:
    # A cluster that was started here ends as a whole, which removes the service too.
    if _joined(pair):
        with suppress(RayError, FutureTimeoutError):
            # The ingress goes first: it calls the models.
            remove(names(pair.config.serve)[::-1], instance)


def _targets(pair: Pair, plan: Plan, digests: Sequence[str] = ()) -> list[RunTarget]:
    """The applications of a pair, and the paths that they serve."""
    settings = pair.config.serve
    return [
        RunTarget(one, name=key, route_prefix=settings.prefix if key == settings.name else None)
        for key, one in applications(pair, plan.roles, digests)
    ]


def _check_room(pair: Pair, plan: Plan, held: Mapping[str, float] | None = None) -> None:
    """Tells what the replicas need, before anything waits for room.

    Raises:
        UserError: if they cannot fit on the cluster and no nodes may join.
    """
    if not plan.short:
        say(plan.summary)
        return
    whole = find_served_plan(pair.config, nodes(), held)
    if whole.short and not pair.config.actors.autoscaling:
        raise UserError(whole.refusal)
    say(f"serve: short of room now ({plan.short}); replicas wait up to serve.start_timeout_s")


def _tell(pair: Pair, instance: Instance, digests: Sequence[str]) -> None:
    """Tells where the service answers, how to update it, and whether it needs tokens."""
    settings = pair.config.serve
    where = instance.url(settings.prefix)
    say(f"serve: {pair.version} answers at {where} (a page to try it on; the API: {where}/docs)")
    address = ray.get_runtime_context().gcs_address
    # A cluster that was started here needs the token of ~/.ray; one that was joined may not.
    mode = "" if _joined(pair) else "RAY_AUTH_MODE=token "
    command = f"{mode}RAY_ADDRESS={address} lmcot serve"
    say(f"serve: to update it: {command} --run-dir NEWER --update")
    say(f"serve: its state: {command} --run-dir NEWER --status")
    if not digests:
        far = "" if is_loopback(instance.host) else "; other machines reach it"
        say(f"serve: authentication is off ({settings.tokens_env} is not set){far}")


def _update(pair: Pair) -> None:
    settings = pair.config.serve
    held = check_ours(settings, names(settings))
    digests = token_digests(settings)
    if not digests:
        handle = ray_serve.get_app_handle(settings.name)
        digests = tuple(handle.digests.remote().result(timeout_s=60))
        if digests:
            say(f"serve: {settings.tokens_env} is not set: the tokens stay as they were")
    instance = start_instance(settings)
    plan = find_served_plan(pair.config, nodes(), held)
    _check_room(pair, plan, held)
    started = time.monotonic()
    deploy(_targets(pair, plan, digests), settings.start_timeout_s)
    check_strangers(instance, settings, tokens=bool(digests))
    say(f"serve: updated in {time.monotonic() - started:.1f} s")


def _status(settings: ServeSettings) -> dict[str, Any]:
    """What the cluster serves, for programs; ``address`` is null if Ray Serve does not run."""
    instance = find_instance()
    if instance is None:
        return {"address": None, "applications": {}}
    there = ray_serve.status().applications
    return {
        "address": instance.url(settings.prefix),
        "applications": {
            name: {
                "status": there[name].status.value,
                "deployments": {
                    key: {"status": one.status.value, "replicas": dict(one.replica_states),
                          "message": one.message}
                    for key, one in there[name].deployments.items()
                },
            }
            if name in there
            else None
            for name in names(settings)
        },
    }  # fmt: skip


def _show_status(pair: Pair, *, as_json: bool) -> None:
    settings = pair.config.serve
    if as_json:
        print(json.dumps(_status(settings)))
        return
    instance = find_instance()
    if instance is None:
        print("Ray Serve does not run on this cluster")
        return
    there = ray_serve.status().applications
    print(f"address  {instance.url(settings.prefix)}")
    for name in names(settings):
        one = there.get(name)
        print(f"{name}  {one.status.value if one else 'not there'}")
        for key, deployment in one.deployments.items() if one else ():
            counts = ", ".join(f"{n} {state}" for state, n in deployment.replica_states.items())
            print(f"  {key}  {deployment.status.value}  {counts}  {deployment.message}".rstrip())


def _joined(pair: Pair) -> str | None:
    """The address of the cluster to join; None if one is started here."""
    return pair.config.actors.address or os.environ.get("RAY_ADDRESS")


def check_port(host: str, port: int) -> None:
    """Checks that the service can listen there.

    Raises:
        UserError: if something else listens there.
    """
    if reason := why_taken(host, port):
        raise UserError(
            f"the service cannot listen at {host}:{port} ({reason}): set serve.port to another "
            "port, or stop what listens there"
        )


class _Signals:
    """Handles SIGTERM and SIGINT: they interrupt whatever runs, except while it serves.

    While it serves, the first one lets requests in flight finish; a second one interrupts that.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._serves = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        self._before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def install(self) -> None:
        """Puts the handlers in place."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def wait(self) -> None:
        """Waits for the first signal."""
        self._serves = True
        self._ended.wait()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._serves or self._ended.is_set():
            raise KeyboardInterrupt
        self._ended.set()
