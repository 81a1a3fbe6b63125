"""`lmcot serve`: the service of a run directory, until it is told to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

import ray
from ray import serve as ray_serve

from lmcot.actors.cluster import ray_cluster
from lmcot.errors import UserError
from lmcot.monitor.progress import say
from lmcot.serve.app import applications, check_port
from lmcot.serve.asking import Pair, open_pair

if TYPE_CHECKING:
    from lmcot.storage import Place


def serve(
    run_dir: Place,
    overrides: Sequence[str] = (),
    *,
    policy: str | None = None,
    update: bool = False,
) -> None:
    """Serves a run's trained pair.

    Args:
        policy: which of its policies; unset: the most trained one.
        update: put it in the place of what runs already on the cluster of RAY_ADDRESS, replica by
            replica, and return.

    Raises:
        UserError: if there is no trained pair, no room, or the port is taken.
    """
    pair = open_pair(run_dir, policy, list(overrides))
    settings = pair.config.serve
    if update:
        _update(pair, settings.name)
        return
    check_port(settings.host, settings.port)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    with ray_cluster(pair.config.actors):
        ray_serve.start(http_options={"host": settings.host, "port": settings.port})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        try:
            deploy(pair)
            where = f"http://{settings.host}:{settings.port}"
            say(
                f"serve: {pair.version} answers at {where} (a page to try it on; the API: "
                f"{where}/docs)"
            )
            address = ray.get_runtime_context().gcs_address
            # A cluster of one's own asks for the token of ~/.ray; one that was joined may not.
            mode = "" if _joined(pair) else "RAY_AUTH_MODE=token "
            say(
                f"serve: to update it: {mode}RAY_ADDRESS={address} lmcot serve --run-dir NEWER "
                "--update"
            )
            if not os.environ.get(settings.tokens_env):
                say(f"serve: nobody is asked for a token ({settings.tokens_env} is not set)")
            ended.wait()
            say("serve: ending; what is at work is finished first")
        finally:
            # What takes requests in ends what it is at; only then the models go, and the proxies.
            for name, _ in reversed(applications(pair)):
                ray_serve.delete(name)
            ray_serve.shutdown()


def _update(pair: Pair, name: str) -> None:
    if not ray.is_initialized() and not _joined(pair):
        raise UserError(
            "which service is to be updated? Set RAY_ADDRESS to its cluster's address, and what "
            "else 'lmcot serve' says when it starts"
        )
    with ray_cluster(pair.config.actors):
        _replace(pair, name)


def _joined(pair: Pair) -> str | None:
    """The address of the cluster that is joined, if one is."""
    return pair.config.actors.address or os.environ.get("RAY_ADDRESS")


def _replace(pair: Pair, name: str) -> None:
    if name not in ray_serve.status().applications:
        raise UserError(f"the cluster serves no application '{name}' that could be updated")
    started = time.monotonic()
    deploy(pair)
    say(f"serve: updated in {time.monotonic() - started:.1f} s")


def deploy(pair: Pair) -> None:
    """Deploys a pair, and waits until all its replicas are there.

    Raises:
        UserError: what kept them from it.
    """
    name = pair.config.serve.name
    targets = [
        ray_serve.RunTarget(one, name=key, route_prefix="/" if key == name else None)
        for key, one in applications(pair)
    ]
    try:
        ray_serve.run_many(targets)
    except RuntimeError as error:
        told = next((one for one in ray_serve.status().applications.values() if one.message), None)
        reason = "; ".join(
            f"{key}: {one.message.strip().splitlines()[-1]}"
            for key, one in (told.deployments.items() if told else [])
            if one.message
        )
        raise UserError(f"the service did not start: {reason or error}") from None
