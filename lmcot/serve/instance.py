"""Ray Serve on the cluster: finds or starts it, deploys to it, and leaves it as it was."""

from __future__ import annotations

import http.client
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.api import RunTarget, _run_many
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmcot.config import ServeSettings
from lmcot.errors import UserError, first_line
from lmcot.monitor.progress import say
from lmcot.network import is_loopback

_TOLD_EVERY_S = 10.0
_POLL_S = 0.2
_DEPLOYMENTS = ("SmallLM", "FrozenLM", "Ingress")
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(frozen=True, slots=True)
class Instance:
    """A running Ray Serve."""

    host: str
    port: int
    root_path: str
    started_here: bool

    def url(self, prefix: str) -> str:
        """The URL of what is served under a prefix."""
        host = ray.util.get_node_ip_address() if self.host in ("0.0.0.0", "::") else self.host
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.port}{self.root_path}{prefix}".rstrip("/")


def find_instance() -> Instance | None:
    """The running Ray Serve; None if there is none."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options = client.http_config
    return Instance(options.host or "127.0.0.1", options.port, options.root_path, False)


def start_instance(settings: ServeSettings) -> Instance:
    """Ray Serve, started unless it runs already.

    Raises:
        UserError: if it runs already and accepts requests from more machines than the settings.
    """
    # Serve logs each of its steps; what matters is told here.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    found = find_instance()
    if found is None:
        ray_serve.start(http_options={"host": settings.host, "port": settings.port})
        return Instance(settings.host, settings.port, "", True)
    if is_loopback(settings.host) and not is_loopback(found.host):
        raise UserError(
            f"Ray Serve runs on this cluster already and listens at {found.host}:{found.port}, for "
            f"other machines too, but serve.host is {settings.host}: set serve.host={found.host} "
            f"if they may send requests, and {settings.tokens_env} to the tokens they need"
        )
    if (found.host, found.port) != (settings.host, settings.port):
        say(
            f"serve: Ray Serve runs on this cluster already and listens at {found.host}:"
            f"{found.port}; serve.host and serve.port are ignored"
        )
    return found


def check_free(settings: ServeSettings, names: Sequence[str]) -> None:
    """Checks that the cluster serves nothing under these names or the prefix.

    Raises:
        UserError: naming the application that is in the way.
    """
    there = _applications()
    for name in reversed(names):
        if name in there:
            update = "put this run in its place with --update, or " if _ours(there, names) else ""
            raise UserError(
                f"the cluster serves an application '{name}' already: {update}set serve.name to "
                "another name"
            )
    _check_prefix(there, settings.prefix, names)


def check_ours(settings: ServeSettings, names: Sequence[str]) -> dict[str, float]:
    """Checks that the applications of these names are a service of lmcot that can be updated.

    Returns:
        the CPUs of a replica of each role.

    Raises:
        UserError: if they are not.
    """
    there = _applications()
    if names[-1] not in there:
        raise UserError(f"the cluster serves no application '{names[-1]}' that could be updated")
    if not _ours(there, names):
        raise UserError(
            f"the cluster's application '{names[-1]}' is not a service of lmcot: set serve.name to "
            "that of the service to update"
        )
    _check_prefix(there, settings.prefix, names)
    held = {}
    for role, name, deployment in zip(
        ("small", "frozen", "ingress"), names, _DEPLOYMENTS, strict=True
    ):
        options = there[name]["deployments"][deployment]["deployment_config"]["ray_actor_options"]
        held[role] = float(options.get("num_cpus") or 0.0)
    return held


def _applications() -> dict[str, Any]:
    client = _get_global_client(raise_if_no_controller_running=False)
    found: dict[str, Any] = client.get_serve_details()["applications"] if client else {}
    return found


def _ours(there: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(
        deployment in there.get(name, {}).get("deployments", {})
        for name, deployment in zip(names, _DEPLOYMENTS, strict=True)
    )


def _check_prefix(there: Mapping[str, Any], prefix: str, names: Collection[str]) -> None:
    inside = f"{prefix.rstrip('/')}/v1"
    for name, one in there.items():
        taken = one.get("route_prefix")
        if name in names or not taken:
            continue
        if taken in (prefix, inside) or taken.startswith(f"{inside}/"):
            raise UserError(
                f"the cluster's application '{name}' takes the requests to {taken}: serve under "
                "another path, with --prefix"
            )


def deploy(targets: Sequence[RunTarget], limit_s: float) -> None:
    """Deploys applications and waits until all their replicas run.

    Raises:
        UserError: if one fails, or the time limit passes; it names what was missing.
    """
    try:
        _run_many(
            targets,
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    except (RayServeException, ValueError) as error:
        raise UserError(f"the service did not start: {first_line(error)}") from None
    began = told = time.monotonic()
    while waited := _waited_for([one.name for one in targets]):
        now = time.monotonic()
        if now - began > limit_s:
            raise UserError(
                f"the service did not start within {limit_s:g} s (serve.start_timeout_s): it "
                f"was waiting for {waited}"
            )
        if now - told > _TOLD_EVERY_S:
            told = now
            say(f"serve: {now - began:.0f} s, waiting for {waited}")
        time.sleep(_POLL_S)


def _waited_for(names: Sequence[str]) -> str:
    """The applications that do not run yet; empty if all do.

    Raises:
        UserError: if one failed.
    """
    there = ray_serve.status().applications
    waited = []
    for name in names:
        one = there.get(name)
        if one is not None and one.status.value == "RUNNING":
            continue
        messages = [
            (key, found.message.strip().splitlines())
            for key, found in (one.deployments.items() if one else [])
            if found.message.strip()
        ]
        if one is not None and one.status.value in _FAILED:
            # The error stands last, below its traceback.
            reason = "; ".join(f"{key}: {lines[-1]}" for key, lines in messages) or one.message
            raise UserError(f"the service did not start: {reason}")
        waited.append(f"{name} ({'; '.join(lines[0] for _, lines in messages) or 'starting'})")
    return ", ".join(waited)


def check_strangers(instance: Instance, settings: ServeSettings, *, tokens: bool) -> None:
    """Sends a request without a token: a service with tokens must refuse it.

    Raises:
        UserError: if the service answers it, or cannot be reached.
    """
    wanted = 401 if tokens else 200
    named = settings.allowed_hosts[0].replace("*", "any") if settings.allowed_hosts else ""
    path = f"{instance.root_path}{settings.prefix.rstrip('/')}/v1/models"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(instance.host, instance.host)
    deadline, found = time.monotonic() + 30.0, 0
    while time.monotonic() < deadline:
        found = _from_a_proxys_node(host, instance.port, path, named)
        # A proxy needs a moment to learn about the application.
        if found not in (0, 404, 503):
            break
        time.sleep(_POLL_S)
    if found == wanted:
        return
    if tokens and found == 200:
        raise UserError(
            "a request without a token was answered, though tokens are set: the service does not "
            "start; does another version of lmcot run on the cluster?"
        )
    told = f"got the status {found}, not {wanted}" if found else "got no answer"
    raise UserError(f"a first request to {instance.url(settings.prefix)} {told}")


def _from_a_proxys_node(host: str, port: int, path: str, named: str) -> int:
    here, proxies = ray.get_runtime_context().get_node_id(), list(ray_serve.status().proxies)
    if not proxies or here in proxies:
        return ask(host, port, path, named)
    there = NodeAffinitySchedulingStrategy(proxies[0], soft=False)
    task = ray.remote(ask).options(num_cpus=0, scheduling_strategy=there)
    return int(ray.get(task.remote(host, port, path, named), timeout=60))


def ask(host: str, port: int, path: str, named: str = "") -> int:
    """The HTTP status of a GET; 0 if there is no answer."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", path, headers={"host": named} if named else {})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def finish_requests(name: str, limit_s: float) -> None:
    """Makes the ingress refuse new requests, and waits for those in flight."""
    handle = ray_serve.get_app_handle(name)
    deadline = time.monotonic() + limit_s
    while (left := deadline - time.monotonic()) > 0:
        if not sum(handle.broadcast("end").results(timeout_s=left)):
            return
        time.sleep(_POLL_S)


def remove(names: Sequence[str], instance: Instance) -> None:
    """Deletes applications, one after the other; ends Ray Serve if it was started here.

    Ray Serve stays if others use it by now.
    """
    for name in names:
        ray_serve.delete(name)
    if instance.started_here and not _applications():
        _stop_listening()
        ray_serve.shutdown()


def _stop_listening() -> None:
    # Ray reports the end of Serve's controller as a failure that it will try to repair.
    worker = ray._private.worker.global_worker
    worker.threads_stopped.set()
    worker.gcs_error_subscriber.close()
